"""Terminal, page and API with bad words, ports and models: none starts, each says why."""

import socket

import pytest
from conftest import TINY
from support.refusals import here, refuse, table, trained  # noqa: F401, fixtures

# What is wrong, the program, its words, what the message says.
DEMOS = [
    ("an unknown flag", "web_demo.py", "--portt 1", "Unknown flag --portt"),
    ("a misspelt flag", "api_demo.py", "--server_prt 1", "Did you mean --server_port?"),
    ("a stray word", "cli_demo.py", "{tiny}", "Unknown word"),
    ("a flag without its value", "web_demo.py", "--server_port", "Argument --server_port: expected one argument"),
    ("no model", "cli_demo.py", "", "--model_name_or_path is missing"),
    ("no model", "api_demo.py", "--server_port {free}", "--model_name_or_path is missing"),
    ("a model that is not there", "web_demo.py", "--server_port {free} --model_name_or_path ./none", "./none"),
    (
        "a port in use",
        "web_demo.py",
        "--model_name_or_path {tiny} --server_port {busy}",
        "{busy} (Address already in use)",
    ),
    (
        "a port in use",
        "api_demo.py",
        "--model_name_or_path {tiny} --server_port {busy}",
        "{busy} (Address already in use)",
    ),
    ("a port of text", "web_demo.py", "--model_name_or_path {tiny} --server_port http", ("--server_port", "'http'")),
    ("a negative port", "api_demo.py", "--model_name_or_path {tiny} --server_port -1", "--server_port -1"),
    ("a port beyond 65535", "web_demo.py", "--model_name_or_path {tiny} --server_port 70000", "--server_port 70000"),
    ("port 0", "api_demo.py", "--model_name_or_path {tiny} --server_port 0", "--server_port 0"),
    (
        "an address of another machine",
        "web_demo.py",
        "--model_name_or_path {tiny} --server_name 192.0.2.1",
        "192.0.2.1",
    ),
    (
        "an address that is none",
        "api_demo.py",
        "--model_name_or_path {tiny} --server_name no.such.invalid",
        "no.such.inv",
    ),
    ("a password without a user", "web_demo.py", "--auth secret", "user:password"),
    (
        "no answers at once",
        "api_demo.py",
        "--server_port {free} --model_name_or_path {tiny} --concurrency 0",
        "--concurrency 0",
    ),
    ("no queue", "web_demo.py", "--server_port {free} --model_name_or_path {tiny} --max_queue -1", "--max_queue -1"),
    ("bits of no kind", "cli_demo.py", "--model_name_or_path {tiny} --quantization_bit 3", "--quantization_bit 3"),
    ("a negative length", "cli_demo.py", "--model_name_or_path {tiny} --max_length -1", "--max_length -1"),
    ("a top_p of 7", "cli_demo.py", "--model_name_or_path {tiny} --top_p 7", "--top_p 7"),
    ("a temperature of nan", "cli_demo.py", "--model_name_or_path {tiny} --temperature nan", "--temperature nan"),
    ("a seed of text", "cli_demo.py", "--model_name_or_path {tiny} --seed x", "--seed"),
    ("a seed beyond 64 bits", "cli_demo.py", "--model_name_or_path {tiny} --seed 99999999999999999999", "--seed"),
    (
        "a length without a prefix",
        "cli_demo.py",
        "--model_name_or_path {tiny} --pre_seq_len 4",
        "--pre_seq_len 4 needs",
    ),
    ("another length", "cli_demo.py", "--ptuning_checkpoint {run} --pre_seq_len 9", "--pre_seq_len 9 contradicts"),
    ("a run without checkpoints", "web_demo.py", "--server_port {free} --ptuning_checkpoint {here}", "{here}"),
    ("a checkpoint that is a file", "cli_demo.py", "--ptuning_checkpoint {here}/train.json", "train.json"),
]


@pytest.fixture
def busy():
    """A port that something listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@table(DEMOS)
def test_a_demo_refuses_to_start(case, forks, trained, here, busy):
    program, words, says = case
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    places = {"tiny": TINY, "run": trained, "here": here, "free": free, "busy": busy}
    says = says.format(**places) if isinstance(says, str) else says
    refuse(forks, here, words.format(**places).split(), says, program=program)


def test_a_line_too_long_in_a_pipe_is_refused_by_its_number(forks, here):
    words = ["--model_name_or_path", TINY, "--max_length", "2", "--temperature", "0"]
    done = forks.run("cli_demo.py", words, cwd=here, stdin="你好\n" + "好" * 9000 + "\n")
    assert done.returncode == 2
    assert "error: Line 2: The prompt has" in done.stderr and "Traceback" not in done.stderr
