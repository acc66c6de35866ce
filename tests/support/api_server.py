"""The API on a free port, in front of a file's own `server`, and OpenAI's client of it."""

import pytest

import api_demo
from support.over_http import serve


@pytest.fixture(scope="module")
def port(server):
    port, end = serve(api_demo.create_app(server))
    yield port
    end()


@pytest.fixture(scope="module")
def client(port):
    openai = pytest.importorskip("openai", reason="pip install -r tests/requirements.txt")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
