"""The page over HTTP."""

import http.client
import json
import urllib.request

import pytest

import web_demo
from support.chat_server import SlowServer, make_run, open_server
from support.over_http import free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    server = open_server("--ptuning_checkpoint", run, "--concurrency", 8, server_class=SlowServer)
    yield server
    server.close()


@pytest.fixture(scope="module")
def url(server):
    port = free_port()
    blocks = web_demo.launch(server, server_port=port, block=False)
    yield f"http://127.0.0.1:{port}"
    blocks.close(verbose=False)


def ask_over_http(url, session, prompt, mode="tuned", checkpoint="checkpoint-30", max_length=24, kept=None):
    """Send a message as a page does that has `kept` a conversation; the messages that the page is sent back."""
    handlers = json.loads(request(url, "GET", "/config")[1])["dependencies"]
    respond = next(handler["id"] for handler in handlers if handler["api_name"] == "respond")
    data = [prompt, kept, mode, checkpoint, max_length, 0.8, 0]
    body = json.dumps({"data": data, "fn_index": respond, "session_hash": session}).encode()
    headers = {"content-type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/gradio_api/queue/join", body, headers), timeout=60).read()
    messages = []
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                messages.append(json.loads(line.removeprefix(b"data:")))
                if messages[-1]["msg"] in ("process_completed", "unexpected_error"):
                    return messages
    raise AssertionError("the stream ended without an answer")


def request(url, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read()
