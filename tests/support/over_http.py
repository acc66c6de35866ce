"""Servers on loopback, and requests to them."""

import http.client
import json
import socket
import threading
import time

import uvicorn

from serving.limits import uvicorn_settings


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value, f"not within {seconds} s"
    return value


def serve(app):
    """Run an application on a free port; returns it and what ends it."""
    port = free_port()
    running = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", **uvicorn_settings())
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_for(lambda: running.started)

    def end():
        running.should_exit = True
        thread.join()

    return port, end


def call(port, method, path, body=None, headers=None):
    """(status, decoded JSON) of one request; `body` is bytes or becomes JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()
