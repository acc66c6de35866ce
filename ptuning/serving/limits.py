"""What one client of the page or the API may take of what all share: connections, time, places and tries.

uvicorn bounds none of these: half a request may stay open for good, and one address may open every connection.
A client is an address. X-Forwarded-For is believed only from the proxies in FORWARDED_ALLOW_IPS, uvicorn's own
environment variable; without it everybody behind a proxy is one client.
"""

import asyncio
import contextlib
import ipaddress
import json
import re
import threading
import time
from collections import Counter, OrderedDict

from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.environment import before_serving

MAX_BODY_BYTES = 2**20  # of a request
MAX_CONNECTIONS = 512  # half of the files that Linux lets a process open
HEADER_SECONDS = 10.0  # for the head of a request, from the connection or the last answer on
BODY_SECONDS = 30.0  # for the body
WRITE_SECONDS = 60.0  # for a client to read what the system no longer takes for it
END_SECONDS = 8  # for answers on their way when the program is told to end
FREE_TRIES = 5  # wrong passwords or keys before the first wait
LONGEST_WAIT = 900.0  # seconds
MAX_REMEMBERED = 10_000  # clients whose wrong tries are counted
CLOSE = {"Connection": "close"}  # header
HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")  # what half a surrogate pair may be spelled with in JSON


# ---- shares


def client_key(host: str | None) -> str:
    """The key of a client: its address; of IPv6 the network of 64 bits, which is what one customer gets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 6:
        return str(ipaddress.ip_network((address.packed, 64), strict=False))
    return str(address)


def client_of(scope: dict) -> str:
    """The key of an ASGI request's client."""
    return client_key(scope["client"][0] if scope.get("client") else None)


def fair_share(total: int, held: Counter, client) -> int:
    """How much of `total` a client may hold while others hold `held` (a Counter): one more share stays free."""
    clients = {key for key, count in held.items() if count} | {client}
    return max(1, total // (len(clients) + 1))


class Turns:
    """A few at once, and one of each client, so that nobody waits for all that another client sent."""

    def __init__(self, at_once):
        self._at_once, self._busy, self._changed = at_once, [], threading.Condition()

    @contextlib.contextmanager
    def turn(self, client):
        """Wait on this thread for a turn."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._busy) < self._at_once and client not in self._busy)
            self._busy.append(client)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(client)
                self._changed.notify_all()


class Attempts:
    """Wrong passwords or keys of each client. After FREE_TRIES it must wait, twice as long after each one more.

    A try counts as wrong until succeeded() is called, so tries side by side are counted too.
    """

    def __init__(self, clock=time.monotonic):
        self._clock, self._tries = clock, OrderedDict()  # client -> (tries, when the next one is let through)

    def begin(self, client):
        """Seconds this client must wait; 0 where the try is let through."""
        tries, free_at = self._tries.get(client, (0, 0.0))
        now = self._clock()
        if now < free_at:
            return free_at - now
        tries += 1
        wait = min(LONGEST_WAIT, 2.0 ** min(tries - FREE_TRIES, 20)) if tries >= FREE_TRIES else 0.0
        self._tries[client] = tries, now + wait
        self._tries.move_to_end(client)
        while len(self._tries) > MAX_REMEMBERED:
            self._tries.popitem(last=False)
        return 0.0

    def succeeded(self, client):
        self._tries.pop(client, None)


# ---- requests


def error_response(status, message, headers=None, code=None):
    """An error of OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers=headers)


def holds_half_characters(body: bytes) -> bool:
    """True for JSON with half a surrogate pair in it, which no browser sends: no text in UTF-8 can hold that."""
    try:
        return bool(HALF.search(body)) and not json.dumps(json.loads(body), ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # other faults are for those who read it
        return isinstance(error, UnicodeEncodeError)


class BodyLimit:
    """ASGI middleware: reads the body whole first; 413 for one over 1 MiB, 408 after BODY_SECONDS.

    With `whole_text` 400 for JSON whose text could not be answered: gradio sends back what it was sent.
    """

    def __init__(self, app, whole_text=False):
        self.app, self.whole_text = app, whole_text

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body, size = await asyncio.wait_for(self.read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"The request did not arrive within {BODY_SECONDS:.0f} seconds."
            return await error_response(408, message, CLOSE)(scope, receive, send)
        if body is None:  # the client has gone
            return
        if size > MAX_BODY_BYTES:
            message = f"The request is longer than {MAX_BODY_BYTES:,} bytes."
            return await error_response(413, message, CLOSE)(scope, receive, send)
        if self.whole_text and holds_half_characters(body):
            return await error_response(400, "The text holds half a surrogate pair.")(scope, receive, send)
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return parts.pop() if parts else await receive()

        await self.app(scope, replay, send)

    @staticmethod
    async def read(receive):
        """(body, its size), no body where the client has gone, and only a part of one that is too long."""
        body, size, more = bytearray(), 0, True
        while more and size <= 16 * MAX_BODY_BYTES:  # clients listen when they have sent all, so let them
            message = await receive()
            if message["type"] != "http.request":
                return None, size
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            body += part if size <= MAX_BODY_BYTES else b""
        return bytes(body), size


class LoginLimit:
    """ASGI middleware: 429 for a client that has sent wrong passwords to /login and must wait."""

    def __init__(self, app, attempts):
        self.app, self.attempts = app, attempts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/login"):
            return await self.app(scope, receive, send)
        client = client_of(scope)
        wait = self.attempts.begin(client)
        if wait:
            seconds = str(int(wait) + 1)
            message = f"Too many wrong passwords. Try again in {seconds} s."
            return await error_response(429, message, {**CLOSE, "Retry-After": seconds})(scope, receive, send)

        async def watch(message):
            if message["type"] == "http.response.start" and message["status"] == 200:
                self.attempts.succeeded(client)
            await send(message)

        await self.app(scope, receive, watch)


# ---- connections


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a bound on connections, in all and of each address, and on how long they stand still.

    `held` counts the connections of each client; a subclass of each server has its own. A refused connection costs the
    same however many there are.
    """

    held: Counter

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.ws_protocol_class = None  # a WebSocket would not be counted, and nothing here has one
        self.head_timer = self.write_timer = None
        self.counted_as = None  # the client in `held`; nobody's where the connection was refused

    def connection_made(self, transport):
        super().connection_made(transport)
        client = client_of({"client": self.client})
        held = self.held[client]
        if self.held.total() >= MAX_CONNECTIONS or held >= fair_share(MAX_CONNECTIONS, self.held, client):
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\n\r\n")
            transport.close()
            return
        self.counted_as = client
        self.held[client] += 1
        self.wait_for_head()

    def wait_for_head(self):
        stop_timer(self.head_timer)
        self.head_timer = self.loop.call_later(HEADER_SECONDS, self.head_is_late)

    def head_is_late(self):
        """Every answer starts the time anew, so without a request now there was none since."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def on_response_complete(self):
        self.wait_for_head()
        super().on_response_complete()

    def pause_writing(self):
        super().pause_writing()
        self.write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        stop_timer(self.write_timer)

    def shutdown(self):
        """Close what stands idle or still sends its request; an answer on its way has a little time."""
        super().shutdown()
        arriving = self.cycle is not None and self.cycle.more_body
        self.loop.call_later(0 if arriving else END_SECONDS - 1, self.transport.abort)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        if self.counted_as is not None:
            self.held -= Counter([self.counted_as])
        stop_timer(self.head_timer)
        stop_timer(self.write_timer)


def stop_timer(timer):
    if timer:
        timer.cancel()


def uvicorn_settings() -> dict:
    """Named arguments of uvicorn.Config that set these bounds, for one server alone, which counts its connections."""
    return {
        "http": type("CountingProtocol", (Protocol,), {"held": Counter()}),
        "ws": "none",
        "timeout_graceful_shutdown": END_SECONDS,
        "forwarded_allow_ips": before_serving(),
    }
