"""What the page shows of runs, rows and answers, as HTML in which every text of others is escaped.

The plots are SVG written here: they follow the page's theme and width, need no library of a megabyte in the browser,
and are redrawn only when a number has changed.
"""

import html
import math
import re
from urllib.parse import quote

from board.runs import FAILED, KILLED, RUNNING, STARTING, STOPPED, STOPPING, advice_for
from common.failure import printable

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 180, 56, 22  # of a plot, in its own units
PLOTS = (("loss", "eval_loss"), ("drift",), ("learning_rate",))  # curves that share axes
MOST_CELL = 400  # characters of a cell


def escape(value, most=10_000) -> str:
    """A text of others for HTML, without what steers a terminal, cut short."""
    text = printable(str(value))
    return html.escape(text if len(text) <= most else text[:most] + "…")


def said(text: str, kind: str = "good") -> str:
    """A line that answers a visitor; of kind "bad" it is read out at once."""
    if not text:
        return ""
    role = ' role="alert"' if kind == "bad" else ""
    return f'<p class="said {kind}"{role}>{escape(text)}</p>'


def number(value: float) -> str:
    """A number as a reader wants it: a whole one as it is, of others the four digits that count."""
    if isinstance(value, int) and abs(value) < 1e12:
        return f"{value:,}"
    return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e6) else f"{value:.4g}"


# ---- plots


def plot(curves: dict, names: tuple, words: dict) -> str:
    """An SVG of the curves with these names over the steps; "" where none has a point."""
    drawn = {name: curves[name] for name in names if curves.get(name)}
    if not drawn:
        return ""
    points = [point for curve in drawn.values() for point in curve]
    (left, right), (low, high) = bounds([step for step, _ in points]), bounds([value for _, value in points])

    def place(step, value):
        x = LEFT + (WIDTH - LEFT - 8) * (step - left) / (right - left)
        return f"{x:.1f},{8 + (HEIGHT - BOTTOM - 8) * (high - value) / (high - low):.1f}"

    parts = []
    for index, curve in enumerate(drawn.values()):
        path = " ".join(place(*point) for point in curve)
        parts.append(f'<polyline class="curve-{index}" points="{path}"/>')
        x, _, y = place(*curve[-1]).partition(",")
        parts.append(f'<circle class="curve-{index}" cx="{x}" cy="{y}" r="3"/>')
    for value, y in ((high, 14), (low, HEIGHT - BOTTOM)):
        parts.append(f'<text x="{LEFT - 5}" y="{y}" text-anchor="end">{number(value)}</text>')
    for step, anchor, x in ((left, "start", LEFT), (right, "end", WIDTH - 8)):
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>')
    frame = f'<path class="axes" d="M{LEFT} 8V{HEIGHT - BOTTOM}H{WIDTH - 8}"/>'
    ends = [
        words["at_step"].format(name=words[name], value=number(curve[-1][1]), step=curve[-1][0])
        for name, curve in drawn.items()
    ]
    legend = "".join(f'<span class="curve-{index}">{escape(text)}</span>' for index, text in enumerate(ends))
    return (
        f'<figure id="plot-{names[0]}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape("; ".join(ends))}">'
        f"{frame}{''.join(parts)}</svg><figcaption>{legend}</figcaption></figure>"
    )


def bounds(values):
    """(least, greatest) of finite numbers, never the same."""
    least, greatest = min(values), max(values)
    if least == greatest:
        pad = abs(least) / 10 or 1
        return least - pad, greatest + pad
    return least, greatest


def plots(run, words: dict) -> str:
    """All plots of a run."""
    return f'<div class="plots">{"".join(plot(run.curves, names, words) for names in PLOTS)}</div>' if run else ""


# ---- runs


def state_words(run, words):
    """The state of a run in a few words."""
    text = words[f"state_{run.state}"]
    phase = words.get(f"phase_{run.phase}")
    return f"{text} · {phase}" if phase and run.state == RUNNING else text


def facts(run, words):
    """How far a run is."""
    found = [words["step_of"].format(step=run.step, total=run.total)] if run.total else []
    for name in ("loss", "eval_loss", "drift"):
        if (value := run.latest(name)) is not None and math.isfinite(value):
            found.append(f"{words[name]} {number(value)}")
    if run.alive and run.remaining:
        found.append(words["left"].format(time=run.remaining))
    return found


def strip(runs: list, words: dict) -> str:
    """The line on what is running now, for every tab; "" for nothing."""
    lines = [
        f"<p><b>{escape(run.name)}</b> {escape(' · '.join([state_words(run, words), *facts(run, words)]))}</p>"
        for run in runs
        if run.alive
    ]
    return "".join(lines[:4])


def card(run, words: dict, chinese: bool) -> str:
    """A run in words: its state, how far it is, why it ended and what to do."""
    if run is None:
        return f"<p>{escape(words['no_runs'])}</p>"
    parts = [
        f'<div class="card {run.state}"><p class="state"><b>{escape(run.name)}</b> {escape(state_words(run, words))}</p>',
        f"<p>{escape(' · '.join(facts(run, words)))}</p>",
    ]
    if run.alive and run.state in (STARTING, RUNNING, STOPPING):
        share = f' value="{100 * run.step / run.total:.1f}"' if run.total and run.state != STARTING else ""
        parts.append(f'<progress max="100"{share} aria-label="{escape(state_words(run, words))}"></progress>')
    if run.alive and not run.ours:
        parts.append(f"<p>{escape(words['elsewhere'])}</p>")
    if not run.alive:
        text = run.message or run.reason
        if text and text != "finished":
            parts.append(f'<pre class="reason">{escape(text, 4000)}</pre>')
        advice = words["killed_advice"] if run.state == KILLED else ""
        if run.state in (FAILED, STOPPED):
            advice = advice_for(text, chinese)
        if advice:
            parts.append(f'<p class="advice"><b>{escape(words["to_do"])}:</b> {in_code(advice)}</p>')
    return "".join(parts) + "</div>"


def in_code(text):
    """Text of a page of docs/, what stands in ` ` as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def pre(text: str, label: str) -> str:
    """Lines that a program has printed, in a box that the arrow keys scroll."""
    return f'<pre class="log" tabindex="0" aria-label="{escape(label)}">{escape(text, 100_000)}</pre>' if text else ""


def marked(text: str, label: str) -> str:
    """Lines of --check_data, what the model learns between ⟦ and ⟧ highlighted."""
    return re.sub("⟦(?! and ⟧)[^⟧]*⟧", lambda found: f"<mark>{found[0]}</mark>", pre(text, label))


# ---- tables


def table(titles: list, rows: list, label: str) -> str:
    """A table of texts, in a box that scrolls sideways."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell, MOST_CELL)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def metrics(results: dict, words: dict) -> str:
    """The numbers of a run's results."""
    first = sorted(results.items(), key=lambda result: not result[0].startswith("predict"))  # what answers score
    rows = [(name, number(value)) for name, value in first]
    return table([words["figure"], words["number"]], rows, words["figure"]) if rows else ""


def answers(rows: list, words: dict) -> str:
    """Answers beside their prompts and references."""
    titles = [words["question"], words["reference"], words["answer"]]
    cells = [[row["prompt"], row["labels"], row["predict"]] for row in rows]
    return table(titles, cells, words["answer"]) if cells else said(words["not_evaluated"], "plain")


def links(files: list, words: dict) -> str:
    """Links to files of output/, as gradio serves them."""
    items = []
    for file in files:
        size = words["bytes"].format(size=file.stat().st_size) if file.is_file() else ""
        address = html.escape(f"gradio_api/file={quote(str(file))}")
        items.append(f'<li><a href="{address}" download>{escape(file.name)}</a> {size}</li>' if size else "")
    return f'<ul class="files">{"".join(items)}</ul>'


def framed(page: str, title: str) -> str:
    """Another program's page inside this one, without scripts, links to here or forms."""
    return f'<iframe class="inside" sandbox="" title="{escape(title)}" srcdoc="{html.escape(page)}"></iframe>'


def chat_frame(address: str, title: str) -> str:
    """The chat's page, which is another program's at an address of its own."""
    return f'<iframe class="inside" title="{escape(title)}" src="{html.escape(address)}"></iframe>'
