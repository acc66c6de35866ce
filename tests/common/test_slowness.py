"""What makes a run slow is said again where it ends and where people look."""

import json
from types import SimpleNamespace

import pytest
from conftest import TINY, synthetic_model
from support.chat_server import open_server

from common.slowness import runs_slower, slow_because
from training.results import write_training_results
from web_demo import Page

REASON = "Generating without CUDA graphs, and slower: out of memory"


@pytest.fixture
def slow():
    for _ in range(2):
        with pytest.warns(UserWarning, match="without CUDA graphs"):
            runs_slower(REASON)


def test_nothing_is_said_where_nothing_is_slow():
    assert slow_because() == {}


def test_the_results_of_training_name_it_once(slow):
    shown, saved = {}, {}
    trainer = SimpleNamespace(
        args=SimpleNamespace(device="cpu", should_save=False),
        log_metrics=lambda split, metrics: shown.update(metrics),
        save_metrics=lambda split, metrics: saved.update(metrics),
        save_state=lambda: None,
        state=SimpleNamespace(log_history=[]),
    )
    write_training_results(trainer, synthetic_model(), {}, num_rows=1)
    assert shown["slow_because"] == saved["slow_because"] == json.loads(json.dumps(REASON))


def test_the_status_of_page_and_api_names_it(slow):
    server = open_server("--model_name_or_path", TINY)
    try:
        assert server.facts("base")["slow_because"] == REASON
        assert REASON in Page(server).describe("base", {"no_prefix": "no prefix"})
    finally:
        server.close()
