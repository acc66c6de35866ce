"""A page to talk to the tuned model, with the base model beside it.

Answers to the official `web_demo.py` of the ptuning folder. It differs in that whatever a user or the model
writes is shown as text (the official page passes HTML through), in running on gradio 6 without patching it, in
asking many visitors' questions at once, and in switching prefixes while it runs.

    bash web_demo.sh
    python ptuning/web_demo.py --ptuning_checkpoint output/my-run --server_port 7861
"""

import argparse
import html
import sys
import threading
import time

from arguments import add_model_arguments, parse_demo_words
from common.failure import catch_signals, leave_on_signal, run
from first_look import look_at_demo


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="web_demo.py", description="A page to talk to the tuned model.")
    add_model_arguments(parser)
    parser.add_argument("--server_name", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
    parser.add_argument("--server_port", type=int, default=7860, help="Port to listen on [7860].")
    parser.add_argument("--share", action="store_true", help="A public link through gradio's servers.")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="Ask visitors for this user and password.")
    args = parse_demo_words(parser, argv)
    if args.auth is not None:
        user, colon, password = args.auth.partition(":")
        if not (user and colon and password):
            raise ValueError("--auth: expected user:password, such as --auth admin:secret.")
        args.auth = (user, password)
    return args


if __name__ == "__main__":  # --help and mistakes are answered now: torch and gradio take seconds to load
    run(lambda argv: look_at_demo(parse_arguments(argv)), sys.argv[1:])

import gradio as gr
import torch
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from common.environment import before_page
from serving.limits import END_SECONDS, Attempts, BodyLimit, LoginLimit, client_key, uvicorn_settings
from serving.loading import opened_server
from serving.markdown import LATEX_DELIMITERS, as_markdown, literally
from serving.server import BASE, Busy, Sampling

EXAMPLES = (
    "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套*衣款式#破洞",
    "类型#裙*颜色#黑色*风格#性感*裙型#百褶*裙长#连衣裙",
    "类型#锅*颜色#白色*风格#北欧*功能#聚热*锅款式#炒锅",
)
MODES = ("tuned", "base", "both")
SIDES = ("left", "right")  # the two columns; the right one is there in mode both only
YIELD_SECONDS = 0.05  # a page that is told of every token does little else
LONG_TEXT = 4000  # characters; one that is longer is refreshed less often, because all of it is rendered anew
WORDS = {  # name -> English, Chinese
    "title": ("Talk to the tuned model", "与微调后的模型对话"),
    "mode": ("Who answers", "由谁回答"),
    "tuned": ("Tuned (with the prefix)", "微调模型（带前缀）"),
    "base": ("Base (without it)", "原模型（不带前缀）"),
    "both": ("Both, side by side", "两者并排"),
    "checkpoint": ("Checkpoint of the run", "本次训练的检查点"),
    "left": ("Conversation", "对话"),
    "right": ("Base model", "原模型"),
    "message": ("Your message", "输入"),
    "placeholder": ("Enter sends, Shift+Enter starts a new line", "回车发送，Shift+回车换行"),
    "submit": ("Submit", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重新回答"),
    "undo": ("Undo", "撤回"),
    "clear": ("Clear", "清空"),
    "theme": ("Light / dark", "浅色 / 深色"),
    "settings": ("Settings", "设置"),
    "max_length": ("Maximum length of an answer (new tokens)", "回答的最大长度（新生成的 token 数）"),
    "top_p": ("Top P", "Top P"),
    "temperature": ("Temperature (0: always the likeliest)", "温度（0 表示总选最可能的词）"),
    "examples": ("Examples", "示例"),
    "prefix": ("{model} (prefix of {pre_seq_len})", "{model}（前缀长度 {pre_seq_len}）"),
    "no_prefix": ("base model, no prefix", "原模型，不带前缀"),
    "waiting": ("waiting for a place …", "正在排队 …"),
    "speed": ("{tokens} tokens, {speed:.1f} tokens/s", "{tokens} 个 token，每秒 {speed:.1f} 个"),
    "end_stop": ("ended by itself", "自然结束"),
    "end_length": ("ended at the maximum length", "达到最大长度"),
    "end_cancelled": ("stopped", "已停止"),
    "end_error": ("failed: {error}", "出错：{error}"),
    "dropped": ("the oldest {count} turns no longer fit and were left out", "历史过长，最早的 {count} 轮未送入模型"),
    "busy": ("Too many requests at the moment. Try again in a while.", "当前请求过多，请稍后再试。"),
}
TEXTS = {code: {name: texts[place] for name, texts in WORDS.items()} for place, code in enumerate(("en", "zh-CN"))}


# ---- what is shown


def bubbles(turns):
    """The chat's messages from [(question, answer)]."""
    messages = []
    for question, answer in turns:
        for role, text in (("user", literally(question)), ("assistant", as_markdown(answer))):
            # As a dictionary the text keeps its indentation; without a character there would be no bubble.
            messages.append({"role": role, "content": [{"type": "text", "text": text or "\u200b"}]})
    return messages


def words_for(request):
    """The texts written on the server, in the browser's first language."""
    return TEXTS["zh-CN" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"]


# ---- what the buttons do


class Page:
    """Handlers of the page's events. A conversation is {"left": turns, "right": turns}, one for each column."""

    def __init__(self, server):
        self.server = server
        self.running = {}  # session of the page -> its answers that are being computed

    def models(self, mode, checkpoint):
        """Which model answers in which column."""
        tuned, base = checkpoint or self.server.default, self.server.base
        return {"tuned": {"left": tuned}, "base": {"left": base}, "both": {"left": tuned, "right": base}}[mode]

    def respond(self, question, turns, mode, checkpoint, max_length, top_p, temperature, request: gr.Request):
        """Answer in every column that is there; yields what `outputs` of `build` names, as the answers grow."""
        session, client = request.session_hash, client_key(request.client.host)
        if not question.strip() or session in self.running:
            yield self.update()
            return
        words = words_for(request)
        changed = threading.Event()
        answers, notes = {}, {}
        self.running[session] = answers
        try:
            sampling = Sampling(max_new_tokens=int(max_length), top_p=top_p, temperature=temperature)
            for side, model in self.models(mode, checkpoint).items():
                with self.server.preparing(client):
                    token_ids, dropped = self.server.fit(question, turns[side], sampling.max_new_tokens, model)
                notes[side] = [words["dropped"].format(count=dropped)] if dropped else []
                answers[side] = self.server.submit(
                    token_ids,
                    model=model,
                    sampling=sampling,
                    notify=lambda answer: changed.set(),
                    session=(session, side),
                    client=client,
                )
            yield from self.show(question, turns, answers, notes, words, changed)
        except (ValueError, OSError, Busy) as error:
            message = words["busy"] if isinstance(error, Busy) else str(error)
            yield self.update(box=question, status=as_status([message]), busy=False)
        finally:  # also where the page was closed
            self.cancel(answers)
            self.running.pop(session, None)

    def show(self, question, turns, answers, notes, words, changed):
        """Yield the growing answers until all of them have ended."""
        box, busy = "", True
        before = {side: bubbles(turns[side]) for side in answers}  # once, not at every refresh
        while True:
            finished = all(answer.finish_reason for answer in answers.values())
            new = {**turns, **{side: [*turns[side], (question, answer.text)] for side, answer in answers.items()}}
            lines = [self.status(answer, notes[side], words) for side, answer in answers.items()]
            yield self.update(
                box=box,
                columns=[[*before[side], *bubbles(new[side][-1:])] if side in answers else gr.skip() for side in SIDES],
                status=as_status(lines),
                turns=new,
                busy=False if finished else busy,
            )
            if finished:
                return
            box, busy = gr.skip(), None
            time.sleep(YIELD_SECONDS * (1 + sum(len(answer.text) for answer in answers.values()) / LONG_TEXT))
            changed.wait(timeout=1)  # not longer: a yield lets the page close this generator
            changed.clear()

    @staticmethod
    def update(box=None, columns=None, status=None, turns=None, busy=None):
        """Values for `outputs` of `build`; None leaves one as it is."""
        values = [box, *(columns or [None, None]), status, turns]
        values = [gr.skip() if value is None else value for value in values]
        if busy is None:
            return [*values, *[gr.skip()] * 6]
        return [*values, gr.update(interactive=busy), *[gr.update(interactive=not busy)] * 5]

    def status(self, answer, notes, words):
        """One line: model, checkpoint, prefix, bits, device, speed, why the answer ended."""
        parts = [self.describe(answer.model, words)]
        if answer.response_ids:
            parts.append(words["speed"].format(tokens=len(answer.response_ids), speed=answer.tokens_per_second))
        elif not answer.finish_reason:
            parts.append(words["waiting"])
        if answer.finish_reason:
            parts.append(words[f"end_{answer.finish_reason}"].format(error=answer.error))
        return " · ".join([*parts, *notes])

    def retry(self, turns, mode, checkpoint, max_length, top_p, temperature, request: gr.Request):
        """Ask the last question again."""
        if not turns["left"]:
            yield self.update()
            return
        question = turns["left"][-1][0]
        turns = {side: turns[side][:-1] for side in SIDES}
        yield from self.respond(question, turns, mode, checkpoint, max_length, top_p, temperature, request)

    def undo(self, turns, request: gr.Request):
        """Take back the last turn; its question returns to the box."""
        if not turns["left"] or request.session_hash in self.running:
            return self.update()
        question = turns["left"][-1][0]
        turns = {side: turns[side][:-1] for side in SIDES}
        return self.update(question, [bubbles(turns[side]) for side in SIDES], "", turns)

    def clear(self, request: gr.Request):
        if request.session_hash in self.running:
            return self.update()
        self.close(request)
        return self.update("", [[], []], "", {side: [] for side in SIDES})

    def switch(self, turns, mode, request: gr.Request):
        """Show the second column or hide it; it starts as a copy of the first, so both know the same history."""
        words = words_for(request)
        if mode != "both":
            return gr.update(label=words["left"]), gr.update(visible=False), turns
        turns = {**turns, "right": list(turns["left"])}
        right = gr.update(visible=True, value=bubbles(turns["right"]))
        return gr.update(label=words["tuned"]), right, turns

    def describe(self, model, words):
        facts = self.server.facts(model)
        prefix = words["prefix"].format(**facts) if facts["pre_seq_len"] else words["no_prefix"]
        if not facts["pre_seq_len"] and model != BASE:  # weights that were tuned themselves
            prefix = model
        parts = [facts["base_model"], prefix, facts["weights"], facts["device"], facts.get("slow_because")]
        return " · ".join(filter(None, parts))

    def choose(self, checkpoint, request: gr.Request):
        """Read the prefix of a checkpoint, so that the first question need not wait for it."""
        try:
            return as_status([self.describe(checkpoint, words_for(request))])
        except (ValueError, OSError) as error:
            return as_status([str(error)])

    def opened(self, request: gr.Request):
        """The choices of checkpoints as they are now: a run that is still training gets new ones between two visits."""
        names = self.server.models()[:-1]
        return gr.update(choices=names), as_status([self.describe(self.server.default, words_for(request))])

    @staticmethod
    def cancel(answers):
        for answer in list(answers.values()):
            answer.cancel()

    def stop(self, request: gr.Request):
        self.cancel(self.running.get(request.session_hash, {}))

    def close(self, request: gr.Request):
        """The page was closed: nothing of it stays."""
        self.stop(request)
        for side in SIDES:
            self.server.forget((request.session_hash, side))


def as_status(lines):
    return "<br>".join(html.escape(line) for line in lines)


# ---- the page


def build(server):
    """The page of a ChatServer as gr.Blocks, and its translations."""
    chinese = {code: TEXTS["zh-CN"] for code in ("zh", "zh-CN", "zh-TW", "zh-HK")}
    i18n = gr.I18n(en=TEXTS["en"], **chinese)
    page = Page(server)
    has_prefix = server.default != server.base
    longest = min(32768, server.model.config.seq_length)
    chosen = {"max_new_tokens": 8192, "top_p": 0.8, "temperature": 0.95, **server.sampling}
    with gr.Blocks(title="ChatGLM2 P-Tuning", analytics_enabled=False, fill_width=True) as blocks:
        turns = gr.State({side: [] for side in SIDES})
        with gr.Row(elem_id="head"):
            gr.Markdown(i18n("title"), elem_id="title")
            theme = gr.Button(i18n("theme"), size="sm", scale=0, min_width=140, elem_id="theme")
        with gr.Row():
            mode = gr.Radio(
                [(i18n(name), name) for name in MODES],
                value="tuned" if has_prefix else "base",
                label=i18n("mode"),
                visible=has_prefix,
                elem_id="mode",
                min_width=320,
                scale=3,
            )
            checkpoint = gr.Dropdown(
                server.models()[:-1],
                value=server.default if has_prefix else None,
                label=i18n("checkpoint"),
                visible=has_prefix,
                elem_id="checkpoint",
                min_width=220,
                scale=2,
            )
        with gr.Row():
            chats = [
                gr.Chatbot(
                    label=i18n(side),
                    elem_id=side,
                    visible=side == "left",
                    height=460,
                    buttons=[],
                    feedback_options=None,
                    sanitize_html=True,
                    allow_tags=False,
                    allow_file_downloads=False,
                    latex_delimiters=list(LATEX_DELIMITERS),
                )
                for side in SIDES
            ]
        status = gr.HTML(elem_id="status")
        with gr.Row():
            box = gr.Textbox(
                label=i18n("message"), placeholder=i18n("placeholder"), lines=1, max_lines=8, scale=8, elem_id="message"
            )
            with gr.Column(scale=1, min_width=120):
                submit = gr.Button(i18n("submit"), variant="primary", elem_id="submit")
                stop = gr.Button(i18n("stop"), variant="stop", interactive=False, elem_id="stop")
        with gr.Row():
            retry, undo, clear = (gr.Button(i18n(name), size="sm", elem_id=name) for name in ("retry", "undo", "clear"))
        gr.Examples([[prompt] for prompt in EXAMPLES], inputs=[box], label=i18n("examples"), elem_id="examples")
        with gr.Accordion(i18n("settings"), open=False, elem_id="settings"):
            max_length = gr.Slider(
                1, longest, value=min(chosen["max_new_tokens"], longest), step=1, label=i18n("max_length")
            )
            top_p = gr.Slider(0.01, 1, value=max(0.01, chosen["top_p"]), step=0.01, label=i18n("top_p"))
            temperature = gr.Slider(0, 2, value=min(2, chosen["temperature"]), step=0.01, label=i18n("temperature"))

        settings = [mode, checkpoint, max_length, top_p, temperature]
        outputs = [box, *chats, status, turns, stop, submit, retry, undo, clear, mode]
        # The server has a queue of its own, so every question may come through at once.
        answering = {
            "outputs": outputs,
            "show_progress": "hidden",
            "concurrency_limit": None,
            "trigger_mode": "once",
            "api_visibility": "private",
        }
        quick = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        gr.on([submit.click, box.submit], page.respond, [box, turns, *settings], **answering)
        retry.click(page.retry, [turns, *settings], **answering)
        stop.click(page.stop, **quick)
        undo.click(page.undo, [turns], outputs, **quick)
        gr.on([clear.click, *[chat.clear for chat in chats]], page.clear, None, outputs, **quick)
        mode.input(page.switch, [turns, mode], [*chats, turns], **quick)
        checkpoint.input(page.choose, [checkpoint], [status], **quick)
        theme.click(None, js="() => { document.body.classList.toggle('dark') }", api_visibility="private")
        blocks.load(page.opened, None, [checkpoint, status], **quick)
        blocks.unload(page.close)
    return blocks, i18n


CSS = """
#title { font-size: 1.25rem; }
#status { min-height: 1.5em; font-size: .85rem; color: var(--body-text-color); overflow-wrap: anywhere; }
.message { overflow-wrap: anywhere; }
"""
# All that the page itself asks of gradio; the rest, files, uploads and calls by name among it, is not there.
ALLOWED = "queue/join queue/data run/predict heartbeat startup-events theme.css user login_check token".split()


class OwnPartsOnly:
    """ASGI middleware: 404 for every part of gradio that the page does not use."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        app = self.app
        if scope["type"] == "http":
            path = scope["path"].strip("/")
            name = path.removeprefix("gradio_api/")
            known = name in ALLOWED or name.startswith("heartbeat/")
            if path.startswith("monitoring") or path != name and not known:
                app = PlainTextResponse("This page has no such part.", 404)
        await app(scope, receive, send)


def launch(server, *, server_name="127.0.0.1", server_port=7860, share=False, auth=None, block=True):
    """Open the page; returns the gr.Blocks, to close() where `block` is false."""
    blocks, i18n = build(server)
    at_once = server.max_batch + server.max_queue
    login = [Middleware(LoginLimit, Attempts())] if auth else []
    settings = uvicorn_settings()
    blocks.queue(api_open=False, max_size=4 * at_once, default_concurrency_limit=at_once)
    font = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere
    blocks.launch(
        server_name=server_name,
        server_port=server_port,
        share=share,
        auth=auth,
        auth_message="After several wrong passwords there is a wait. · 密码多次输错后，需等待一段时间再试。",
        prevent_thread_lock=True,
        quiet=True,
        max_threads=at_once + 16,
        max_file_size=1,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        i18n=i18n,
        theme=gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace")),
        css=CSS,
        app_kwargs={"middleware": [Middleware(BodyLimit), Middleware(OwnPartsOnly), *login], "openapi_url": None},
    )
    # gradio takes no settings for uvicorn; uvicorn looks at these again for every connection and at the end.
    blocks.server.config.http_protocol_class = settings["http"]
    blocks.server.config.timeout_graceful_shutdown = settings["timeout_graceful_shutdown"]
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
    if not gr.__version__.startswith("6."):
        raise ValueError(f"gradio 6 is needed and {gr.__version__} is installed. Run: pip install -r requirements.txt")
    if proxies := before_page():
        print(f"{', '.join(proxies)} is set; connections to this machine itself go around it.")
    if not torch.cuda.is_available():
        print(
            "No GPU is visible: answers are computed on the CPU, which is slow for a model of this family's full size."
        )
    everyone = args.server_name in ("0.0.0.0", "::")
    with opened_server(args) as server:
        print(
            f"Open http://{'127.0.0.1' if everyone else args.server_name}:{args.server_port}  (Ctrl-C ends)", flush=True
        )
        if (everyone or args.share) and not args.auth:
            print(
                "Everyone who can reach this machine can use the page. To restrict it: --auth user:password, or "
                "HOST=127.0.0.1",
                flush=True,
            )
        launch(server, server_name=args.server_name, server_port=args.server_port, share=args.share, auth=args.auth)


if __name__ == "__main__":
    run(main, sys.argv[1:])
