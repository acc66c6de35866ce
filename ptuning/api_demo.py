"""The tuned model for applications: an API in OpenAI's format, and the official one.

Answers to the official `api.py` of ChatGLM2-6B (POST /) and to its `openai_api.py` (POST /v1/chat/completions,
GET /v1/models). It differs in that requests are computed together, in that every checkpoint of the run is a model
of its own to ask for, and in that a client that goes away stops its answer.

    python ptuning/api_demo.py --ptuning_checkpoint output/my-run
"""

import argparse
import asyncio
import contextlib
import math
import re
import secrets
import sys
import time
import uuid
from datetime import datetime
from typing import Annotated

from arguments import add_model_arguments, parse_demo_words
from common.start import look_first, work
from first_look import look_at_demo


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="api_demo.py", description="The tuned model as an HTTP API.")
    add_model_arguments(parser)
    parser.add_argument("--server_name", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
    parser.add_argument("--server_port", type=int, default=8000, help="Port to listen on [8000].")
    parser.add_argument("--api_key", help="Ask clients for this key (Authorization: Bearer …).")
    parser.add_argument("--cors_origin", action="append", default=[], help="Let pages of this origin ask; repeatable.")
    args = parse_demo_words(parser, argv)
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        raise ValueError(
            "--api_key: expected a key of visible ASCII characters, which is all that a header carries, without spaces. An "
            "empty one, as of a variable that is not set, would let everybody in."
        )
    for origin in args.cors_origin:
        if origin != "*" and not re.fullmatch("[a-z][a-z0-9+.-]*://[^/\\s]+", origin):
            raise ValueError(
                f"--cors_origin {origin}: expected what browsers call a page's origin, such as https://example.org:8080, "
                "with nothing behind it."
            )
    return args


if __name__ == "__main__":  # --help and mistakes are answered now: torch takes seconds to load
    look_first(lambda argv: look_at_demo(parse_arguments(argv)), sys.argv[1:])

import uvicorn
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from checkpoints.file_names import TENSORS_FILE
from common.files import file_sha256
from serving.api_bodies import CODES, RESPONSES, TOO_LONG, ChatRequest, CompletionRequest, OfficialRequest, said
from serving.api_forms import ChatForm, TextForm, stream, whole
from serving.api_index import docs_page, endpoints, names
from serving.auto import AUTO
from serving.json_mode import check_schema
from serving.limits import Attempts, BodyLimit, client_of, error_response, uvicorn_settings
from serving.loading import opened_server
from serving.prompts import TooLong
from serving.server import Busy, Sampling

LOOK_SECONDS = 0.5  # between looks whether a client is still there


# ---- requests and answers


class NoModel(HTTPException):
    """404 for a model, not for a path."""


class PromptTooLong(HTTPException):
    """400 for a prompt that leaves no room for an answer."""

    def __init__(self, detail):
        super().__init__(400, str(detail))


class RequestId:
    """ASGI middleware: every answer gets an x-request-id, which OpenAI's clients show with an error."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        header = (b"x-request-id", f"req_{uuid.uuid4().hex}".encode())

        async def name(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, name)


class JsonWithoutAType:
    """ASGI middleware: the body of a POST is JSON whatever its Content-Type says, as in the official api.py.

    Not where a web page asks (it has an Origin): a page of strangers may send any type but JSON unasked.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = dict(scope["headers"])
            if b"origin" not in headers:
                headers[b"content-type"] = b"application/json"
                scope = {**scope, "headers": list(headers.items())}
        await self.app(scope, receive, send)


# ---- waiting for answers without blocking


@contextlib.contextmanager
def refusing():
    """Around what a server may refuse: HTTPException 429 or 400 in place of its own errors."""
    try:
        yield
    except Busy as error:
        raise HTTPException(429, str(error), {"Retry-After": "5"}) from error
    except TooLong as error:
        raise PromptTooLong(error) from error
    except (ValueError, OSError) as error:
        raise HTTPException(400, str(error)) from error


class Pending:
    """The answers of one request: submitted together, cancelled together."""

    def __init__(self, server, request):
        self.server, self.request, self.client = server, request, client_of(request.scope)
        self.answers = []
        self.changed = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def notify(self, answer):
        try:
            self.loop.call_soon_threadsafe(self.changed.set)
        except RuntimeError:  # the loop is closed: the program is ending
            answer.cancel()

    async def encode(self, limiter, encode):
        """What encode() returns, the token ids of a request, on a thread; HTTPException 400 or 429."""

        def tokenize():
            with self.server.preparing(self.client):
                return encode()

        with refusing():
            return await run_sync(tokenize, limiter=limiter)

    async def submit(self, token_ids, model, samplings):
        """HTTPException 400 or 429 where the request cannot be taken."""
        how = {"model": model, "notify": self.notify, "client": self.client}
        try:
            with refusing():
                for sampling in samplings:  # on a thread: a prefix may have to be read first
                    answer = await run_in_threadpool(self.server.submit, token_ids, sampling=sampling, **how)
                    self.answers.append(answer)
        except HTTPException:
            self.cancel()
            raise

    async def changes(self):
        """Yield after every change until all have ended; ends early, and cancels, when the client has gone."""
        look = time.monotonic()
        try:
            while True:
                finished = all(answer.finish_reason for answer in self.answers)
                yield
                if finished:
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), LOOK_SECONDS)
                self.changed.clear()
                if time.monotonic() - look > LOOK_SECONDS:  # also while tokens arrive
                    look = time.monotonic()
                    if await self.request.is_disconnected():
                        return
        finally:
            self.cancel()

    async def finish(self):
        """Wait for all; HTTPException 500 where one failed. Nobody reads what is returned to a client that has gone."""
        async for _ in self.changes():
            pass
        for answer in self.answers:
            if answer.finish_reason == "error":
                raise HTTPException(500, answer.error)

    def cancel(self):
        for answer in self.answers:
            answer.cancel()


# ---- the application


def create_app(server, api_key=None, cors_origins=()):
    """The API of a ChatServer."""
    given = server.sampling  # where a request says nothing
    app = FastAPI(title="ChatGLM2 P-Tuning", description=__doc__.partition("\n")[0], redoc_url=None, docs_url=None)
    app.add_middleware(JsonWithoutAType)
    app.add_middleware(BodyLimit)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(RequestId)  # the last one added is the outermost: refusals of the others have it, too
    bearer = HTTPBearer(auto_error=False, description="The key of --api_key, where one is set.")

    attempts = Attempts()
    limiter = CapacityLimiter(server.max_batch + server.max_queue)  # threads that wait for their turn to tokenize

    async def check_key(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]):
        """Not on a thread: nothing may come between the look at the tries and the comparison."""
        client, given = client_of(request.scope), credentials.credentials if credentials else ""
        wait = math.ceil(attempts.begin(client)) if given else 0
        if wait:
            message = f"Too many wrong API keys from this address. Try again in {wait} s."
            raise HTTPException(429, message, {"Retry-After": str(wait)})
        if not secrets.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        attempts.succeeded(client)

    locked = [Depends(check_key)] if api_key else []

    @app.exception_handler(HTTPException)
    async def refuse(request, error):
        status, message, code = error.status_code, str(error.detail), CODES.get(error.status_code)
        if status in (404, 405) and not isinstance(error, NoModel):
            message = f"There is no {request.method} {request.url.path} here; there are {names(app)}."
            code = "unknown_url"
        if isinstance(error, PromptTooLong):  # some clients know it by its code, others by OpenAI's words
            code = TOO_LONG
            message += f" This model's maximum context length is {server.model.config.seq_length} tokens."
        return error_response(status, message, error.headers, code)

    @app.exception_handler(RequestValidationError)
    async def refuse_request(request, error):
        # Without the input, which may be anything.
        if isinstance(error.body, bytes) and error.body:  # not read as JSON, see JsonWithoutAType
            return error_response(400, "A web page must send this with the header Content-Type: application/json.")
        found = error.errors()
        problems = [f"{'.'.join(map(str, problem['loc'][1:])) or 'body'}: {problem['msg']}" for problem in found]
        code = None
        if any(problem["type"] == "too_long" and "stop" not in problem["loc"] for problem in found):
            problems.append(f"this model takes {server.model.config.seq_length} tokens for prompt and answer together")
            code = TOO_LONG
        return error_response(400, "; ".join(problems[:3]).encode(errors="replace").decode(), code=code)

    def model_name(name):
        name = name or server.usual
        if name not in server.models() and not (name == AUTO and server.candidates):
            raise NoModel(404, f"There is no model {name!r}; there are {', '.join(server.models())}.")
        return name

    def describe_model(name):
        folder = server.checkpoints().get(name)
        created = int(folder.stat().st_mtime) if folder else started
        return {"id": name, "object": "model", "created": created, "owned_by": server.name}

    started = int(time.time())
    prefix_file = server.checkpoints()[server.default] / TENSORS_FILE if server.default != server.base else None
    digest = file_sha256(prefix_file) if prefix_file else None

    async def respond(form, pending, model, body):
        if body.stream:
            events = stream(form, pending, model, bool(body.stream_options and body.stream_options.include_usage))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        await pending.finish()
        # On a thread: log-probabilities of long prompts are megabytes.
        return await run_in_threadpool(lambda: JSONResponse(whole(form, pending.answers, model)))

    @app.post("/v1/chat/completions", dependencies=locked, responses=RESPONSES)
    async def chat_completions(body: ChatRequest, request: Request):
        """Answer a conversation, whole or, with `stream`, as server-sent events."""
        pending = Pending(server, request)
        model = await run_in_threadpool(model_name, body.model)  # on a thread: it looks into the run's folder
        samplings = body.samplings(given, server.model.config.seq_length)

        def encode():
            if samplings[0].schema is not None:
                check_schema(samplings[0].schema)
            messages = said(body.messages, server.tokenizer.keeps_roles)
            question, history, role = server.tokenizer.conversation(messages)
            return server.encode(question, history, model, role=role)

        token_ids = await pending.encode(limiter, encode)
        await pending.submit(token_ids, model, samplings)
        return await respond(ChatForm(server.tokenizer), pending, model, body)

    @app.post("/v1/completions", dependencies=locked, responses=RESPONSES)
    async def completions(body: CompletionRequest, request: Request):
        """Go on with raw text, or score it with `echo` and `logprobs`."""
        pending = Pending(server, request)
        model = await run_in_threadpool(model_name, body.model)
        prompts = await pending.encode(limiter, lambda: [server.read_prompt(prompt) for prompt in body.prompts()])
        samplings = body.samplings(given)
        for _, token_ids in prompts:
            await pending.submit(token_ids, model, samplings)
        texts = [text for text, _ in prompts]
        form = TextForm(server.tokenizer, texts, len(samplings), body.echo, body.max_tokens == 0)
        return await respond(form, pending, model, body)

    @app.get("/v1/models", dependencies=locked, responses={401: RESPONSES[401]})
    def models():
        """The model that answers by default, then every other checkpoint, the base model, and auto, which chooses."""
        names = [*server.models(), *([AUTO] if server.offers_auto() else [])]
        ordered = sorted(names, key=lambda name: name != server.usual)
        return {"object": "list", "data": [describe_model(name) for name in ordered]}

    @app.get("/v1/models/{model}", dependencies=locked, responses={401: RESPONSES[401], 404: RESPONSES[404]})
    def one_model(model: str):
        """One of them."""
        return describe_model(model_name(model))

    @app.post("/", dependencies=locked, responses=RESPONSES)
    async def official(body: OfficialRequest, request: Request):
        """The official API: prompt and history in, response and longer history out."""
        history = [(question, answer) for question, answer in body.history or []]
        pending = Pending(server, request)
        token_ids = await pending.encode(limiter, lambda: server.encode(body.prompt, history, server.usual))
        max_length = min(body.max_length or 2048, server.model.config.seq_length)
        if len(token_ids) >= max_length:
            raise PromptTooLong(
                f"The prompt has {len(token_ids)} tokens, and max_length is {max_length} for prompt and answer."
            )
        sampling = Sampling(
            max_new_tokens=max_length - len(token_ids),
            top_p=given.get("top_p", 0.7) if body.top_p is None else body.top_p,
            temperature=given.get("temperature", 0.95) if body.temperature is None else body.temperature,
        )
        await pending.submit(token_ids, server.usual, [sampling])
        await pending.finish()
        response = pending.answers[0].text
        return {
            "response": response,
            "history": [*history, (body.prompt, response)],
            "status": 200,
            "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        }

    @app.get("/")
    async def index():
        """Where everything is."""
        return {"name": app.title, "model": server.default, "docs": "/docs", "paths": endpoints(app)}

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    async def docs():
        return docs_page(app)

    @app.get("/health")
    async def health():
        """Which weights and which prefix answer, and how busy they are."""
        running, waiting = server.load()
        return {
            "status": "ok",
            **server.facts(server.default),
            "prefix_file": str(prefix_file) if prefix_file else None,
            "prefix_sha256": digest,
            "running": running,
            "waiting": waiting,
        }

    return app


# ---- the program


def main(argv):
    args = parse_arguments(argv)
    name, port = args.server_name, args.server_port
    with opened_server(args) as server:
        app = create_app(server, args.api_key, args.cors_origin)
        print(f"Listening on http://{name}:{port}, documented at /docs (Ctrl-C ends)", flush=True)
        if name not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
            print("Everyone who can reach this machine can use the API. To restrict it: --api_key KEY", flush=True)
        uvicorn.run(app, host=name, port=port, log_level="warning", **uvicorn_settings())


if __name__ == "__main__":
    work(main, sys.argv[1:])
