"""A page to talk to the tuned model, with the base model beside it.

Answers to the official `web_demo.py` of the ptuning folder. It differs in that whatever a user or the model
writes is shown as text (the official page passes HTML through), in running on gradio 6 without patching it, in
asking many visitors' questions at once, and in switching prefixes while it runs.

    bash web_demo.sh
    python ptuning/web_demo.py --ptuning_checkpoint output/my-run --server_port 7861
"""

import argparse
import sys
import time
from pathlib import Path

from arguments import add_model_arguments, parse_demo_words
from common.failure import catch_signals, leave_on_signal
from common.start import look_first, work
from first_look import look_at_demo


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="web_demo.py", description="A page to talk to the tuned model.")
    add_model_arguments(parser)
    parser.add_argument("--server_name", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
    parser.add_argument("--server_port", type=int, default=7860, help="Port to listen on [7860].")
    parser.add_argument("--share", action="store_true", help="A public link through gradio's servers.")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="Ask visitors for this user and password.")
    parser.add_argument("--feedback", metavar="FILE", help="Add what visitors prefer to this file, one JSON a line.")
    args = parse_demo_words(parser, argv)
    if args.auth is not None:
        user, colon, password = args.auth.partition(":")
        if not (user and colon and password):
            raise ValueError("--auth: expected user:password, such as --auth admin:secret.")
        args.auth = (user, password)
    if args.feedback and not (Path(args.feedback).parent.is_dir() and not Path(args.feedback).is_dir()):
        raise ValueError(f"--feedback {args.feedback}: expected a file in a folder that is there.")
    return args


if __name__ == "__main__":  # --help and mistakes are answered now: torch and gradio take seconds to load
    look_first(lambda argv: look_at_demo(parse_arguments(argv)), sys.argv[1:])

import gradio as gr
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from checkpoint import choose_device
from serving.limits import END_SECONDS, BodyLimit
from serving.loading import opened_server
from serving.markdown import LATEX_DELIMITERS
from serving.opening import (
    ALLOWED,
    address_of,
    is_for_everyone,
    keep_theme,
    open_page,
    path_in,
    prepare_page,
    translations,
)
from serving.page_events import SIDES, Page, first_mode, modes_of
from serving.page_examples import examples_of
from serving.page_kept import COLUMNS, FeedbackFile, empty
from serving.page_words import TEXTS

FILES = Path(__file__).parent / "serving"  # page.css and page.js

# ---- the page


def build(server, feedback=None):
    """The page of a ChatServer as gr.Blocks, and its translations; thumbs are written to a FeedbackFile."""
    i18n, page = translations(TEXTS), Page(server, feedback)
    has_prefix = server.default != server.base
    longest = min(32768, server.model.config.seq_length)
    chosen = {"max_new_tokens": 8192, "top_p": 0.8, "temperature": 0.95, **server.sampling}
    examples = [{"text": text} for text in examples_of(server.checkpoints().get(server.default))]
    # The browser reads what it keeps after a restart only if name and key are the same; the key hides nothing.
    place = f"{server.name}/{server.run_folder.name if server.run_folder else ''}"
    with gr.Blocks(title="ChatGLM2 P-Tuning", analytics_enabled=False, fill_width=True, fill_height=True) as blocks:
        kept = gr.BrowserState(empty(), storage_key=f"conversation of {place}", secret="kept in this browser")
        look = gr.BrowserState(None, storage_key="theme of the page", secret="kept in this browser")
        with gr.Sidebar(open=False, label=i18n("settings"), elem_id="settings"):
            checkpoint = gr.Dropdown(
                server.models()[:-1],
                value=server.default if has_prefix else None,
                label=i18n("checkpoint"),
                visible=has_prefix,
                elem_id="checkpoint",
            )
            max_length = gr.Slider(
                1, longest, value=min(chosen["max_new_tokens"], longest), step=1, label=i18n("max_length")
            )
            top_p = gr.Slider(0.01, 1, value=max(0.01, chosen["top_p"]), step=0.01, label=i18n("top_p"))
            temperature = gr.Slider(0, 2, value=min(2, chosen["temperature"]), step=0.01, label=i18n("temperature"))
            export = gr.Button(i18n("export"), elem_id="export")
        with gr.Column(elem_id="page"):
            with gr.Row(elem_id="head"):
                gr.Markdown(i18n("heading"), elem_id="title")
                mode = gr.Radio(
                    [(i18n(name), name) for name in modes_of(server)],
                    value=first_mode(server),
                    label=i18n("mode"),
                    show_label=False,
                    visible=has_prefix,
                    elem_id="mode",
                )
                clear = gr.Button(i18n("clear"), size="sm", scale=0, min_width=60, elem_id="clear")
                theme = gr.Button(i18n("theme"), size="sm", scale=0, min_width=60, elem_id="theme")
            with gr.Row(elem_id="chats"):
                chats = [
                    gr.Chatbot(
                        label=i18n(COLUMNS[first_mode(server)][0] if side == "left" else "base"),
                        elem_id=side,
                        visible=side == "left",
                        height=None,
                        min_width=280,
                        buttons=["copy"],
                        placeholder=i18n("empty" if side == "left" else "empty_base"),
                        examples=examples if side == "left" else None,
                        sanitize_html=True,
                        allow_tags=False,
                        allow_file_downloads=False,
                        latex_delimiters=list(LATEX_DELIMITERS),
                    )
                    for side in SIDES
                ]
            status = gr.HTML(elem_id="status", js_on_load="element.setAttribute('role', 'status')")
            other = gr.Button(i18n("other"), size="sm", elem_id="other")  # page.js shows it
            with gr.Row(elem_id="ask"):
                box = gr.Textbox(
                    label=i18n("message"),
                    show_label=False,
                    placeholder=i18n("placeholder"),
                    lines=1,
                    max_lines=8,
                    scale=8,
                    min_width=160,
                    elem_id="message",
                )
                submit = gr.Button(i18n("submit"), variant="primary", scale=0, min_width=80, elem_id="submit")
                stop = gr.Button(i18n("stop"), variant="stop", scale=0, min_width=80, visible=False, elem_id="stop")

        settings = [mode, checkpoint, max_length, top_p, temperature]
        outputs = [box, *chats, status, kept, stop, submit, clear, mode]
        # The server has a queue of its own, so every question may come through at once.
        answering = {
            "inputs": [kept, *settings],
            "outputs": outputs,
            "show_progress": "hidden",
            "concurrency_limit": None,
            "trigger_mode": "once",
            "api_visibility": "private",
        }
        quick = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        browser = {"show_progress": "hidden", "api_visibility": "private"}  # nothing is asked of the server
        for asking in (
            gr.on([submit.click, box.submit], page.respond, **{**answering, "inputs": [box, kept, *settings]}),
            gr.on([chat.retry for chat in chats], page.retry, **answering),
            gr.on([chat.edit for chat in chats], page.edit, **answering),
            mode.input(page.switch, **answering),
            other.click(page.other, **answering),
            chats[0].example_select(page.example, **answering),
        ):
            asking.failure(None, None, [status], js="() => window.refused", **browser)
        stop.click(page.stop, **quick)
        gr.on([chat.undo for chat in chats], page.undo, [kept, mode], outputs, **quick)
        gr.on([clear.click, *[chat.clear for chat in chats]], page.clear, [mode, checkpoint], outputs, **quick)
        if feedback:
            gr.on([chat.like for chat in chats], page.judge, [kept, mode], [status], **quick)
        checkpoint.input(page.choose, [checkpoint], [status], **quick)
        kept.change(None, [kept], None, js="(kept) => window.onKept?.(kept)", **browser)
        export.click(None, None, None, js="() => window.saveConversation()", **browser)
        keep_theme(blocks, theme, look, **browser)
        blocks.load(page.opened, [kept], [checkpoint, mode, *chats, box, status, kept], **quick)
        blocks.unload(page.close)
        gr.api(page.chat, api_name="chat", concurrency_limit=None)
    return blocks, i18n


class OwnPartsOnly:
    """ASGI middleware: 404 for every part of gradio that the page does not use."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        app = self.app
        if scope["type"] == "http":
            path = path_in(scope)
            name = path.removeprefix("gradio_api/")
            known = name in ALLOWED or name.startswith("heartbeat/")
            if path.startswith("monitoring") or path != name and not known:
                app = PlainTextResponse("This page has no such part.", 404)
        await app(scope, receive, send)


def launch(server, *, server_name="127.0.0.1", server_port=7860, share=False, auth=None, feedback=None, block=True):
    """Open the page; returns the gr.Blocks, to close() where `block` is false."""
    blocks, i18n = build(server, feedback)
    at_once = server.max_batch + server.max_queue
    blocks.queue(api_open=False, max_size=4 * at_once, default_concurrency_limit=at_once)
    open_page(
        blocks,
        i18n,
        FILES,
        TEXTS,
        middleware=[Middleware(BodyLimit, whole_text=True), Middleware(OwnPartsOnly)],
        server_name=server_name,
        server_port=server_port,
        share=share,
        auth=auth,
        max_threads=at_once + 16,
        max_file_size=1,
    )
    if block:
        wait_for_the_end(server)
    return blocks


def wait_for_the_end(server):
    """Keep the page open until a signal, then give the answers on their way a little time, and end the program."""
    told = []

    def tell(number, frame):
        if told:  # a second time
            leave_on_signal(number, frame)
        told.append(number)

    catch_signals(tell)
    while not told:
        time.sleep(0.1)
    server.close(END_SECONDS)
    time.sleep(0.5)  # the pages are told the ends of their answers
    for tunnel in CURRENT_TUNNELS:
        tunnel.kill()
    leave_on_signal(told[0], None)  # without waiting for open pages, which listen for ever


# ---- the program


def main(argv):
    args = parse_arguments(argv)
    prepare_page()
    if choose_device() == "cpu":
        print(
            "No GPU is visible: answers are computed on the CPU, which is slow for a model of this family's full size."
        )
    feedback = FeedbackFile(args.feedback) if args.feedback else None
    with opened_server(args) as server:
        print(f"Open {address_of(args)}  (Ctrl-C ends)", flush=True)
        if (is_for_everyone(args) or args.share) and not args.auth:
            print(
                "Everyone who can reach this machine can use the page. To restrict it: --auth user:password, or "
                "HOST=127.0.0.1",
                flush=True,
            )
        where = {"server_name": args.server_name, "server_port": args.server_port, "share": args.share}
        launch(server, **where, auth=args.auth, feedback=feedback)


if __name__ == "__main__":
    work(main, sys.argv[1:])
