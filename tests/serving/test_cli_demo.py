"""The terminal: commands, streaming, Ctrl-C, and prompts through a pipe."""

import builtins
import codecs
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
from conftest import ROOT, TINY
from support.chat_server import GREEDY, QUERIES, SlowServer, finish, make_run, open_server

import cli_demo
from serving.server import BASE, Sampling


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = open_server("--ptuning_checkpoint", make_run(tmp_path_factory.mktemp("run")), server_class=SlowServer)
    yield server
    server.close()


@pytest.fixture
def talk(server, monkeypatch, capsys):
    def type_in(*lines):
        remaining = list(lines)

        def read(prompt=""):
            if not remaining:
                raise EOFError
            line = remaining.pop(0)
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(builtins, "input", read)
        cli_demo.talk(server, GREEDY)
        assert not remaining or lines[-len(remaining) - 1] in ("exit", "stop")
        return capsys.readouterr().out

    return type_in


def test_a_message_is_answered_with_the_history_of_the_conversation(talk, server):
    first = finish(server, QUERIES[0]).text
    second = finish(server, QUERIES[1], [(QUERIES[0], first)]).text
    output = talk(QUERIES[0], QUERIES[1])
    assert f"{first}\n[checkpoint-30 · " in output and f"{second}\n[checkpoint-30 · " in output
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s · (stop|length)\]", output)


def test_clear_forgets_the_conversation(talk, server):
    first = finish(server, QUERIES[0]).text
    assert talk(QUERIES[0], "clear", QUERIES[0]).count(f"{first}\n") == 2


def test_the_prefix_is_switched_off_and_on_and_checkpoints_by_number(talk, server):
    output = talk(
        "prefix off",
        QUERIES[0],
        "clear",
        "checkpoint 10",
        QUERIES[0],
        "clear",
        "prefix off",
        "prefix on",
        "checkpoint 7",
    )
    assert finish(server, QUERIES[0], model=BASE).text in output
    assert finish(server, QUERIES[0], model="checkpoint-10").text in output
    assert output.count("Answering: checkpoint-10, 4 virtual tokens.") == 2
    assert "There is no model 'checkpoint-7'; there are checkpoint-10, checkpoint-20, checkpoint-30" in output


@pytest.mark.parametrize("word", ["help", "?", "？"])
def test_help_lists_the_commands_and_the_checkpoints_of_the_run(word, server):
    shown = cli_demo.Terminal(server, GREEDY).command(word)
    assert shown.startswith(cli_demo.HELP)
    assert shown.endswith(
        "Here there are: checkpoint-10, checkpoint-20, checkpoint-30, base. Answering: checkpoint-30."
    )


def test_without_a_prefix_none_can_be_switched_on():
    server = open_server("--model_name_or_path", TINY)
    try:
        assert "no prefix to switch on" in cli_demo.Terminal(server, GREEDY).command("prefix on")
    finally:
        server.close()


@pytest.mark.parametrize("word", ["exit", "stop"])
def test_exit_and_stop_leave(talk, word):
    assert "tokens/s" not in talk(word, QUERIES[0])


def test_words_that_only_look_like_commands_are_messages(server):
    terminal = cli_demo.Terminal(server, GREEDY)
    for line in ("prefix", "checkpoint", "checkpoint one", "please clear", "prefix maybe"):
        assert terminal.command(line) is None


def test_ctrl_c_at_the_prompt_does_not_leave(talk, server):
    assert finish(server, QUERIES[0]).text in talk(KeyboardInterrupt, QUERIES[0])


def test_a_question_too_long_is_refused_with_the_numbers_and_the_conversation_goes_on(talk, server):
    output = talk("好" * 3000, QUERIES[0])
    assert "error: The prompt has" in output
    assert finish(server, QUERIES[0]).text in output


def test_the_oldest_turns_are_left_out_with_a_note(server, capsys):
    terminal = cli_demo.Terminal(server, Sampling(max_new_tokens=4, temperature=0))
    terminal.history = [("你好", "好" * 300)] * 8
    terminal.answer(QUERIES[0])
    assert re.search(r"\(the oldest \d turns no longer fit", capsys.readouterr().out)


def test_control_characters_of_the_model_are_shown_as_escapes(server, capsys):
    server.script = "a\x1b[2Jb\x07\x9bc\r\u202e\n\td"
    try:
        cli_demo.Terminal(server, GREEDY).answer("你好")
    finally:
        server.script = None
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\\x9bc\\r\\u202e\n\td\n"


def test_a_pipe_gets_one_answer_a_line_each_without_history(server, capsys):
    cli_demo.answer_lines(server, GREEDY, [f"{QUERIES[0]}\n", "\n", "clear\r\n", QUERIES[0]])
    lines = capsys.readouterr().out.split("\n")
    answer = finish(server, QUERIES[0]).text
    assert lines == [answer, "", finish(server, "clear").text, answer, ""]


def test_a_line_break_in_an_answer_stays_on_its_line(server, capsys):
    server.script = "一\n二"
    try:
        cli_demo.answer_lines(server, GREEDY, ["你好"])
    finally:
        server.script = None
    assert capsys.readouterr().out == "一\\n二\n"


def test_a_prompt_too_long_in_a_pipe_is_named_by_its_line(server):
    with pytest.raises(ValueError, match="Line 2: The prompt has"):
        cli_demo.answer_lines(server, GREEDY, ["你好", "好" * 3000])


@pytest.mark.slow
def test_ctrl_c_in_a_real_terminal_stops_the_answer_and_not_the_program(server):
    code = (
        "import cli_demo, support.chat_server as t\n"
        "from serving.server import Sampling\n"
        f"server = t.open_server('--ptuning_checkpoint', {str(server.run_folder)!r}, server_class=t.SlowServer)\n"
        "server.endless, server.delay = True, 0.02\n"
        "cli_demo.talk(server, Sampling())\n"
        "server.close()\n"  # as main() does: a thread that computes while Python ends may abort it
    )
    path = os.pathsep.join((str(ROOT / "ptuning"), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "LC_ALL": "C.UTF-8", "TERM": "dumb"}
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell starts with it ignored
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    seen, decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")

    def expect(pattern, seconds=60):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not re.search(pattern, seen):
            ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, seen
            seen += decoder.decode(os.read(terminal, 65536))
        seen = seen[re.search(pattern, seen).end() :]

    try:
        expect("\n> ")
        os.write(terminal, "你好\r".encode())
        expect("你好\r\n.{10}")
        os.write(terminal, b"\x03")
        expect(r"tokens/s · stopped\]")
        expect("\n> ")
        os.write(terminal, b"exit\r")
        assert os.waitpid(child, 0)[1] == 0
        child = None
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
