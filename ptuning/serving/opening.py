"""How a page of gradio opens here: nothing is fetched from elsewhere, nothing is shown or monitored beside the page itself.

Answers to `demo.queue().launch(…)` of the official `web_demo.py`.
"""

import json
from pathlib import Path

import gradio as gr

from serving.limits import uvicorn_settings

VISITORS_KEPT = 128  # what gradio knows of a visitor takes 0.16 MB


def open_page(blocks: gr.Blocks, i18n, files: Path, texts: dict, *, middleware: list, **settings) -> None:
    """Launch a page with the page.css and page.js of a folder and its `texts` {language: {name: text}}, and return.

    `settings` are launch()'s that differ from page to page.
    """
    font = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere
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
