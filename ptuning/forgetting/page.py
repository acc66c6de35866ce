"""General prompts answered by base and tuned model, side by side: lines for a terminal and forgetting.html.

The page is one file that loads nothing; all text in it is escaped.
"""

import html

from common.failure import printable
from common.messages import cut_short

PAGE_FILE = "forgetting.html"  # in a run's folder
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 40rem; table-layout: fixed; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .7rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; white-space: pre-wrap; } .same { opacity: .6; } .empty { opacity: .5; font-style: italic; }
"""


def lines_of(answers: list[dict[str, str]]) -> str:
    """Text, three lines for each {"prompt", "base", "tuned"}, whatever the texts hold."""
    lines = []
    for row in answers:
        texts = {**row, "tuned": "(the same)" if row["tuned"] == row["base"] else row["tuned"] or "(nothing)"}
        lines += [f"  {name:<6}  {cut_short(' '.join(text.split()), 150)}" for name, text in texts.items()]
    return "\n".join(lines)


def page_of(answers: list[dict[str, str]], sentence: str) -> str:
    """The page as text, for the {"prompt", "base", "tuned"} of lines_of; `sentence` is on how much is forgotten."""
    rows = [
        f"<tr>{cell(row['prompt'])}{cell(row['base'])}{cell(row['tuned'], same=row['tuned'] == row['base'])}</tr>"
        for row in answers
    ]
    titles = ("prompt · 问题", "base · 基座模型", "tuned · 微调后")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Forgetting</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Forgetting · 遗忘</h1>\n"
        f"<p>{escape(sentence)}</p>\n"
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>\n</body>\n</html>\n"
    )


def cell(text, same=False):
    kind = "empty" if not text else "same" if same else ""
    return f'<td class="{kind}">{escape(text or "(nothing)")}</td>'


def escape(text):
    """Text for the page, without what HTML or a terminal would act upon."""
    return html.escape(printable(text))
