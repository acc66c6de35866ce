"""What one client may take: connections, time, turns and tries; over real sockets where uvicorn is concerned."""

import asyncio
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import uvicorn
from conftest import ROOT, TINY
from support.over_http import free_port, wait_for
from uvicorn.server import ServerState

from serving import limits
from serving.limits import MAX_CONNECTIONS, Attempts, BodyLimit, Turns, client_key, fair_share, uvicorn_settings

# ---- who a client is, and its share


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("testclient", "testclient", True),
        (None, "192.0.2.1", False),
    ],
)
def test_a_client_is_an_address_or_a_customers_network_of_ipv6(one, other, same):
    assert (client_key(one) == client_key(other)) is same


def test_a_share_always_leaves_one_for_a_client_that_is_not_there_yet():
    held = Counter()
    for client in "abc":
        while held[client] < fair_share(72, held, client) and held.total() < 72:
            held[client] += 1
    assert held == {"a": 36, "b": 24, "c": 12}
    assert fair_share(1, Counter(), "a") == 1


def test_turns_are_taken_by_one_of_each_client_at_a_time():
    turns, inside, most, entered = Turns(2), [], Counter(), threading.Semaphore(0)
    leave = threading.Event()

    def work(client):
        with turns.turn(client):
            inside.append(client)
            entered.release()
            leave.wait(60)
            inside.remove(client)

    threads = [threading.Thread(target=work, args=[client]) for client in "aaaaab"]
    for thread in threads:
        thread.start()
    for _ in "ab":
        assert entered.acquire(timeout=60)
    most.update(inside)
    leave.set()
    for thread in threads:
        thread.join(60)
    assert most == {"a": 1, "b": 1} and inside == []


# ---- tries


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_wrong_tries_wait_longer_and_longer_and_a_right_one_starts_anew():
    clock = Clock()
    attempts = Attempts(clock)
    waits = []
    for _ in range(limits.FREE_TRIES + 12):
        assert attempts.begin("a") == 0
        waits.append(attempts.begin("a"))
        clock.now += waits[-1]
        if not waits[-1]:  # that one was let through, too
            attempts.succeeded("a")
            break
    assert waits == [0.0]
    for _ in range(limits.FREE_TRIES):
        assert attempts.begin("b") == 0
    waits = []
    for _ in range(12):
        waits.append(attempts.begin("b"))
        clock.now += waits[-1]
        assert attempts.begin("b") == 0
    assert waits[:4] == [1, 2, 4, 8] and waits[-1] == limits.LONGEST_WAIT
    assert attempts.begin("c") == 0  # another client does not wait
    attempts.succeeded("b")
    assert attempts.begin("b") == 0


def test_tries_side_by_side_are_counted_before_any_of_them_has_failed():
    attempts = Attempts(Clock())
    assert [attempts.begin("a") > 0 for _ in range(50)] == [False] * limits.FREE_TRIES + [True] * 45


def test_no_more_than_a_bounded_number_of_clients_is_remembered(monkeypatch):
    monkeypatch.setattr(limits, "MAX_REMEMBERED", 10)
    attempts = Attempts(Clock())
    for client in range(1000):
        attempts.begin(client)
    assert len(attempts._tries) == 10


# ---- connections


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def much(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": b"a" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def open_app():
    ends = []

    def open_app(app):
        port = free_port()
        config = uvicorn.Config(BodyLimit(app), host="127.0.0.1", port=port, log_level="error", **uvicorn_settings())
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        wait_for(lambda: running.started)
        ends.append((running, thread))
        return port, running

    yield open_app
    for running, thread in ends:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def connect(port, text=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(text)
    return connection


def status(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    return connection.getresponse().status


HALF_HEAD = b"GET / HTTP/1.1\r\nHost: a\r\nX-"
HALF_BODY = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf"
WHOLE = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", HALF_HEAD, WHOLE + HALF_HEAD], ids=["nothing", "half", "half after an answer"])
def test_a_connection_that_does_not_finish_the_head_of_a_request_is_closed(open_app, monkeypatch, sent):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.5)
    port, running = open_app(answer)
    connection = connect(port, sent)
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    wait_for(lambda: not running.server_state.connections)


def test_an_answer_may_take_longer_than_a_head(open_app, monkeypatch):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.2)

    async def slow(scope, receive, send):
        import asyncio

        await asyncio.sleep(1)
        await answer(scope, receive, send)

    assert status(open_app(slow)[0]) == 200


def test_a_body_that_does_not_arrive_is_answered_with_408_and_closed(open_app, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    port, running = open_app(answer)
    connection = connect(port, HALF_BODY)
    assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    wait_for(lambda: not running.server_state.connections)


def test_a_client_that_does_not_read_its_answer_is_cut_off(open_app, monkeypatch):
    monkeypatch.setattr(limits, "WRITE_SECONDS", 0.5)
    port, running = open_app(much)
    connection = connect(port, WHOLE)
    wait_for(lambda: running.server_state.connections)
    wait_for(lambda: not running.server_state.connections)
    connection.close()


def test_one_address_may_not_hold_every_connection(open_app, monkeypatch):
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    port, running = open_app(answer)
    held = [connect(port, HALF_HEAD) for _ in range(4)]
    wait_for(lambda: len(running.server_state.connections) == 4)
    assert connect(port, WHOLE).recv(1000).startswith(b"HTTP/1.1 503")
    other = socket.create_connection(("127.0.0.1", port), timeout=30, source_address=("127.0.0.2", 0))
    other.sendall(WHOLE)
    assert other.recv(1000).startswith(b"HTTP/1.1 200")
    for connection in held:
        connection.close()
    wait_for(lambda: status(port) == 200)


def test_a_forwarded_address_is_believed_only_from_a_proxy_that_was_named(monkeypatch):
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    assert uvicorn_settings()["forwarded_allow_ips"] == ""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.7")
    assert uvicorn_settings()["forwarded_allow_ips"] == "192.0.2.7"


# ---- the end


def program(name, *words):
    port = free_port()
    words = ["--model_name_or_path", str(TINY), "--server_port", str(port), *words]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ptuning" / name), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    def is_open():
        try:
            return status(port)
        except OSError:
            return None

    wait_for(is_open, seconds=120)
    return process, port


@pytest.mark.slow
@pytest.mark.parametrize("name", ["api_demo.py", "web_demo.py"])
def test_sigterm_ends_the_program_within_ten_seconds_whatever_clients_do(name):
    process, port = program(name)
    try:
        clients = [connect(port, sent) for sent in (HALF_BODY, HALF_HEAD, b"", WHOLE)]
        heartbeat = b"GET /gradio_api/heartbeat/a HTTP/1.1\r\nHost: a\r\n\r\n"  # an open page
        stream = b'{"messages": [{"role": "user", "content": "a"}], "stream": true}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(stream)
        clients.append(connect(port, heartbeat if name == "web_demo.py" else head + stream))
        time.sleep(1)
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert time.monotonic() - told < 15  # 10 and what a busy machine adds
        assert "Traceback" not in output, output
        assert len(clients) == 5
    finally:
        process.kill()


async def counting_app(scope, receive, send):
    """Answers nothing."""


def test_connections_are_counted_as_they_come_and_go_and_refused_ones_are_not():
    config = uvicorn.Config(counting_app, **uvicorn_settings())
    config.load()
    state = ServerState()

    class Transport:
        def __init__(self, address):
            self.address, self.written, self.closed = address, b"", False

        def get_extra_info(self, name, default=None):
            return (self.address, 1) if name == "peername" else default

        def write(self, data):
            self.written += data

        def close(self):
            self.closed = True

        abort = close

    async def connect(address):
        protocol = config.http_protocol_class(config=config, server_state=state, app_state={})
        protocol.connection_made(Transport(address))
        return protocol

    async def flood():
        flooding = [await connect("127.0.0.2") for _ in range(3 * MAX_CONNECTIONS)]
        other = await connect("127.0.0.3")
        refused = [each for each in flooding if each.transport.closed]
        other_refused, held = other.transport.closed, dict(other.held)
        for each in [*flooding, other]:
            each.connection_lost(None)
        return len(refused), other_refused, held, dict(other.held)

    refused, other_refused, held, left = asyncio.run(flood())
    assert refused == 3 * MAX_CONNECTIONS - MAX_CONNECTIONS // 2
    assert not other_refused
    assert sorted(held.values()) == [1, MAX_CONNECTIONS // 2]
    assert left == {}
