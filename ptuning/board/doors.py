"""What of the page's program a browser may reach: own pages only, from its own site only, in bounded pieces.

The page starts processes, so that a page of somebody else, open in the same browser, must not be able to press its
buttons: neither by a form of its own (its Origin is another one) nor by a name that it lets point to this machine (its
Host is another one).
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from starlette.responses import PlainTextResponse, StreamingResponse

from board.files import MAX_UPLOAD_BYTES
from serving.limits import BodyLimit
from serving.opening import ALLOWED, path_in

CHAT = "chat"  # below this path the chat's own page is shown
SPARE_BYTES = 2**30  # that an upload leaves free on the disk, for checkpoints
HOP = set("connection keep-alive transfer-encoding te trailer upgrade proxy-authorization content-length".split())
NOT_FOR_CHAT = HOP | {"cookie", "origin", "referer", "authorization", "accept-encoding"}


def header(scope, name: str) -> str:
    """A header of an ASGI request, "" where it is missing, and a mark that equals nothing where it is there twice."""
    found = [value for key, value in scope["headers"] if key == name.encode()]
    return found[0].decode("latin-1") if len(found) == 1 else "\0" if found else ""


def is_local(host: str) -> bool:
    """True for a Host that means this machine and that no foreign name server can answer for."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class OwnSiteOnly:
    """ASGI middleware: 403 for requests that another site's page has made, 404 for parts that the page does not use.

    `local`: without a password every request must name this machine in its Host. With one, a foreign name brings no
    cookie of this page, so that the Origin alone is looked at.
    """

    def __init__(self, app, local: bool, output: Path):
        self.app, self.local, self.output = app, local, Path(output).resolve()

    async def __call__(self, scope, receive, send):
        app = self.app
        if scope["type"] == "websocket":
            return
        if scope["type"] == "http":
            app = self.refusal(scope) or app
            send = with_headers(send)
        await app(scope, receive, send)

    def refusal(self, scope):
        """The answer to a request that is let no further, None for one that is."""
        try:
            host, origin = header(scope, "host"), header(scope, "origin")
            foreign = origin and (origin == "null" or urlsplit(origin).netloc != host)
            if (self.local and not is_local(host)) or foreign:
                return PlainTextResponse("This page answers to itself only.", 403)
        except ValueError:
            return PlainTextResponse("This page answers to itself only.", 403)
        if header(scope, "sec-fetch-site") == "cross-site" and header(scope, "sec-fetch-mode") != "navigate":
            return PlainTextResponse("This page answers to itself only.", 403)
        path = path_in(scope)
        if path == CHAT or path.startswith(f"{CHAT}/"):
            return None
        name = path.removeprefix("gradio_api/")
        if path != name and name.startswith("file="):
            return None if self.may_serve(name.removeprefix("file=")) else PlainTextResponse("No such file.", 404)
        known = name in (*ALLOWED, "upload") or name.startswith("heartbeat/")
        if path.startswith(("monitoring", "file=", "file/")) or (path != name and not known):
            return PlainTextResponse("This page has no such part.", 404)
        return None

    def may_serve(self, name):
        """True for a file that an export has written, links followed."""
        try:
            path = Path(name).resolve()
            return path.is_relative_to(self.output / "_exports") and path.is_file()
        except (OSError, ValueError, RuntimeError):
            return False


def with_headers(send):
    """`send`, with headers that keep other sites from showing the page inside theirs."""

    async def add(message):
        if message["type"] == "http.response.start":
            more = [(b"content-security-policy", b"frame-ancestors 'self'"), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return add


class Bodies:
    """ASGI middleware: bodies of at most 1 MiB, but uploads as long as the disk has room for them."""

    def __init__(self, app, output: Path):
        self.app, self.bounded, self.output = app, BodyLimit(app, whole_text=True), output

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or path_in(scope) != "gradio_api/upload":
            return await self.bounded(scope, receive, send)
        length = header(scope, "content-length")
        if not length.isdecimal() or int(length) > MAX_UPLOAD_BYTES + 2**16:
            return await PlainTextResponse(f"At most {MAX_UPLOAD_BYTES:,} bytes.", 413)(scope, receive, send)
        if shutil.disk_usage(self.output).free < int(length) + SPARE_BYTES:
            return await PlainTextResponse("The disk has no room for this file.", 507)(scope, receive, send)
        await self.app(scope, receive, send)


async def until_it_ends(answer):
    """The body of an answer of the chat, as far as it comes: the chat may be ended while it answers."""
    with contextlib.suppress(httpx.HTTPError):
        async for part in answer.aiter_bytes():
            yield part


class ChatDoor:
    """ASGI middleware: below /chat/ the chat's own page, which listens on this machine only.

    It is shown to whom gradio lets in: `login_check` of the page is asked first.
    """

    def __init__(self, app, chat):
        self.app, self.chat = app, chat
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(30, read=None), limits=httpx.Limits(max_connections=64))

    async def __call__(self, scope, receive, send):
        path = path_in(scope) if scope["type"] == "http" else ""
        if path != CHAT and not path.startswith(f"{CHAT}/"):
            return await self.app(scope, receive, send)
        if not await self.is_let_in(scope):
            return await PlainTextResponse("Log in first.", 401)(scope, receive, send)
        if self.chat.state != "open":
            return await PlainTextResponse("No chat is open.", 503)(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        query = scope.get("query_string", b"").decode("latin-1")
        address = f"http://127.0.0.1:{self.chat.port}/{scope['path'].partition('/chat')[2].lstrip('/')}"
        headers = [(key, value) for key, value in scope["headers"] if key.decode("latin-1") not in NOT_FOR_CHAT]
        try:
            request = self.client.build_request(
                scope["method"], f"{address}?{query}" if query else address, content=body, headers=headers
            )
            answer = await self.client.send(request, stream=True)
        except httpx.HTTPError:
            return await PlainTextResponse("The chat does not answer.", 502)(scope, receive, send)
        kept = {
            key: value for key, value in answer.headers.items() if key not in HOP | {"set-cookie", "content-encoding"}
        }
        response = StreamingResponse(until_it_ends(answer), answer.status_code, kept)
        try:
            await response(scope, receive, send)
        finally:
            await answer.aclose()

    async def is_let_in(self, scope):
        """True where the page's own login lets this visitor in."""
        asked = {**scope, "path": "/gradio_api/login_check", "raw_path": b"/gradio_api/login_check", "method": "GET"}
        asked |= {"query_string": b"", "root_path": ""}
        found = []

        async def nothing():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def note(message):
            if message["type"] == "http.response.start":
                found.append(message["status"])

        await self.app(asked, nothing, note)
        return found == [200]
