"""How a page of gradio opens here: nothing is fetched from elsewhere, nothing is shown or monitored beside the page itself.

Answers to `demo.queue().launch(…)` of the official `web_demo.py`.
"""

import json
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from common.environment import before_page
from serving.limits import Attempts, LoginLimit, uvicorn_settings

VISITORS_KEPT = 128  # what gradio knows of a visitor takes 0.16 MB
# All that a page itself asks of gradio; the rest, files, uploads and calls by name among it, is not there.
ALLOWED = (
    "queue/join queue/data run/predict heartbeat startup-events theme.css user login_check token info app_id".split()
)
DARK = "document.body.classList.toggle('dark'"


def prepare_page() -> None:
    """ValueError for another gradio than the one that the pages are made for; says which proxies they go around."""
    if not gr.__version__.startswith("6."):
        raise ValueError(f"gradio 6 is needed and {gr.__version__} is installed. Run: pip install -r requirements.txt")
    if proxies := before_page():
        print(f"{', '.join(proxies)} is set; connections to this machine itself go around it.")


def address_of(args) -> str:
    """Where this machine finds the page of a program with --server_name and --server_port."""
    return f"http://{'127.0.0.1' if is_for_everyone(args) else args.server_name}:{args.server_port}"


def is_for_everyone(args) -> bool:
    """True for a --server_name by which the page listens on every address."""
    return args.server_name in ("0.0.0.0", "::")


def path_in(scope) -> str:
    """The path of an ASGI request as gradio's router reads it."""
    return scope["path"].removeprefix(scope.get("root_path", "")).strip("/")


def translations(texts: dict) -> gr.I18n:
    """What gradio shows of by_language()'s texts."""
    return gr.I18n(en=texts["en"], **dict.fromkeys(("zh", "zh-CN", "zh-TW", "zh-HK"), texts["zh-CN"]))


def keep_theme(blocks: gr.Blocks, button, look, **how) -> None:
    """Let a button change between light and dark, and the gr.BrowserState `look` remember it."""
    button.click(None, None, [look], js=f"() => {DARK}) ? 'dark' : 'light'", **how)
    blocks.load(None, [look], None, js=f"(look) => {{ if (look) {DARK}, look === 'dark') }}", **how)


def open_page(blocks: gr.Blocks, i18n, files: Path, texts: dict, *, middleware: list, **settings) -> None:
    """Launch a page with the page.css and page.js of a folder and its `texts` {language: {name: text}}, and return.

    `settings` are launch()'s that differ from page to page. Where they have `auth`, wrong passwords are counted.
    """
    font = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere
    if settings.get("auth"):
        middleware = [*middleware, Middleware(LoginLimit, Attempts())]
    bounds = uvicorn_settings()
    blocks.launch(
        auth_message="After several wrong passwords there is a wait. · 密码多次输错后，需等待一段时间再试。",
        prevent_thread_lock=True,
        quiet=True,
        state_session_capacity=VISITORS_KEPT,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        i18n=i18n,
        theme=gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace")),
        css=(files / "page.css").read_text(encoding="utf-8"),
        js=f"() => ({(files / 'page.js').read_text(encoding='utf-8')})({json.dumps(texts)})",
        app_kwargs={"middleware": middleware, "openapi_url": None},
        **settings,
    )
    # gradio takes no settings for uvicorn; uvicorn looks at these again for every connection and at the end.
    blocks.server.config.http_protocol_class = bounds["http"]
    blocks.server.config.timeout_graceful_shutdown = bounds["timeout_graceful_shutdown"]
