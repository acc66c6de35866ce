"""Servers on loopback, and requests to them."""

import contextlib
import http.client
import json
import socket
import socketserver
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


@contextlib.contextmanager
def proxy(port, prefix, at=0):
    """A reverse proxy that shows a server under a path and takes the path away; yields its port, and what it was asked.

    Its end cuts every connection.
    """
    asked, connections = [], set()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            method, path, version = self.rfile.readline().decode().split()
            asked.append(path)
            if not path.startswith(f"{prefix}/"):
                self.wfile.write(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                return
            head = [line for line in iter(self.rfile.readline, b"\r\n") if not line.lower().startswith(b"connection:")]
            lengths = [int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length:")]
            first = f"{method} {path.removeprefix(prefix)} {version}\r\nConnection: close\r\n".encode()
            with socket.create_connection(("127.0.0.1", port)) as behind:
                connections.update((behind, self.connection))
                behind.sendall(b"".join([first, *head, b"\r\n", self.rfile.read(sum(lengths))]))
                with contextlib.suppress(OSError):  # the browser has gone
                    while part := behind.recv(2**16):
                        self.wfile.write(part)
                connections.difference_update((behind, self.connection))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True

    with Server(("127.0.0.1", at), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1], asked
        running.shutdown()
        for connection in list(connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
