"""common/environment.py: where the programs set environment variables, and that a user's own stay."""

import ast
import os

import pytest
from conftest import ROOT

from common import environment

FILES = sorted(path for path in (ROOT / "ptuning").rglob("*.py") if path.name != "environment.py")


def changes_of_environment(path):
    """What a file does to os.environ, as source text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found.append(node.value)
        if isinstance(node, ast.Attribute) and node.attr in ("setdefault", "pop", "update", "clear", "putenv"):
            found.append(node.value if node.attr != "putenv" else node)
    return [text for node in found if (text := ast.unparse(node)) in ("os.environ", "environ", "os.putenv")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_one_file_sets_environment_variables(path):
    assert not changes_of_environment(path)


def test_that_file_is_found_to_set_them():
    assert len(changes_of_environment(ROOT / "ptuning/common/environment.py")) > 10


@pytest.mark.parametrize(
    "name, call",
    [
        ("MALLOC_TRIM_THRESHOLD_", environment.before_launch),
        ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", environment.before_torchrun),
        ("WANDB_DIR", lambda: environment.before_wandb("output/run", logged_in=False)),
        ("WANDB_MODE", lambda: environment.before_wandb("output/run", logged_in=False)),
        ("GLOO_SOCKET_IFNAME", lambda: environment.before_joining("eth0", everywhere=True)),
        ("FORWARDED_ALLOW_IPS", environment.before_serving),
    ],
)
def test_a_variable_that_the_user_has_set_stays(name, call, monkeypatch):
    monkeypatch.setattr(os, "environ", {name: "the user's"})
    call()
    assert os.environ[name] == "the user's"


def test_on_one_machine_no_setting_of_the_user_opens_another_network_interface(monkeypatch):
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"})
    environment.before_joining("lo")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}


def test_a_run_started_by_another_run_does_not_meet_its_processes(monkeypatch):
    monkeypatch.setattr(os, "environ", {environment.STORE: "/tmp/store-1"})
    environment.before_launch()
    assert environment.STORE not in os.environ and os.environ[environment.LAUNCHED] == "1"


def test_a_proxy_is_kept_from_this_machine_only_where_one_is_set(monkeypatch):
    monkeypatch.setattr(os, "environ", {"no_proxy": "example.org"})
    assert environment.before_page() == [] and os.environ == {"no_proxy": "example.org"}
    monkeypatch.setattr(os, "environ", {"HTTP_PROXY": "http://proxy:1", "no_proxy": "example.org"})
    assert environment.before_page() == ["http_proxy"]
    assert os.environ["no_proxy"] == "example.org,localhost,127.0.0.1"
    assert os.environ["NO_PROXY"] == "localhost,127.0.0.1"
