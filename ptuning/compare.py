"""Several runs side by side: one table of losses and scores, one plot, and one HTML page with sample answers.

    python ptuning/compare.py output/run-a output/run-b

Answers to no official file. A run is a folder that main.py wrote: trained in, predicted in, or both. A folder of
predictions inside a run shows that run's losses. The page is one file that loads nothing; all text in it is escaped.
"""

import argparse
import base64
import html
import shutil
import sys
from pathlib import Path

from arguments import parse_words
from checkpoints.run_folder import list_checkpoints
from checkpoints.sidecar import read_sidecar
from checkpoints.trainer_state import is_history
from common import failure
from common.files import ANSWERS_FILE, RESULTS_FILE, STATE_FILE, read_json
from common.messages import short_json
from common.plots import draw_lines, new_figure, picture_of
from common.values import is_count, is_number
from data.rows import read_rows

# (title, key of all_results.json or of `losses`, how to show it, whether the highest, the lowest or none is the best)
COLUMNS = (
    ("steps", "steps", "{:,}", None),
    ("training loss", "loss", "{:.4f}", None),
    ("dev loss, start", "first_eval_loss", "{:.4f}", None),
    ("dev loss, best", "best_eval_loss", "{:.4f}", min),
    ("dev loss, end", "last_eval_loss", "{:.4f}", min),
    ("drift", "drift", "{:.3f}", None),
    ("same general answers", "same_answers", "{:.0%}", None),
    ("BLEU-4", "predict_bleu-4", "{:.2f}", max),
    ("ROUGE-1", "predict_rouge-1", "{:.2f}", max),
    ("ROUGE-2", "predict_rouge-2", "{:.2f}", max),
    ("ROUGE-L", "predict_rouge-l", "{:.2f}", max),
    ("rows scored", "predict_samples", "{:,}", None),
    ("trained", "trained_share", "{:.3%}", None),
    ("peak memory, GB", "train_peak_memory_gb", "{:.2f}", None),
    ("samples/s", "train_samples_per_second", "{:.1f}", None),
)
CURVES = {"loss": "training loss", "eval_loss": "dev loss", "drift": "drift on general prompts"}  # {key: title}
CHINESE = {
    "run": "训练",
    "steps": "步数",
    "training loss": "训练 loss",
    "dev loss, start": "验证集 loss，开始",
    "dev loss, best": "验证集 loss，最低",
    "dev loss, end": "验证集 loss，结束",
    "drift": "偏移",
    "same general answers": "不变的通用回答",
    "rows scored": "评分条数",
    "trained": "训练的比例",
    "peak memory, GB": "内存峰值，GB",
    "samples/s": "条/秒",
    "Losses": "loss 曲线",
    "Answers": "回答",
    "row and prompt": "序号和输入",
    "reference": "参考回答",
    "Bold: the best among the runs on one base model and the same rows.": "粗体：同一基座、同样数据的训练里最好的。",
}
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: left; vertical-align: top; }
.figures td { white-space: nowrap; }
.figures td + td, .figures th + th { text-align: right; font-variant-numeric: tabular-nums; }
.answers { table-layout: fixed; min-width: 50rem; } .answers th:first-child { width: 12rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; z-index: 1; }
td small { display: block; opacity: .75; } span[lang] { font-weight: normal; opacity: .75; } th span[lang] { display: block; }
@media (max-width: 40rem) { .answers th:first-child { width: 8rem; } .figures td:first-child { min-width: 5rem; max-width: 8rem; white-space: normal; overflow-wrap: anywhere; } }
.answers td { overflow-wrap: anywhere; white-space: pre-wrap; }
.reference { opacity: .75; } .empty { opacity: .75; font-style: italic; }
img { max-width: 100%; background: white; border-radius: 4px; }
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg); } }
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="Folders that main.py wrote.")
    parser.add_argument("--output_dir", default="output/comparison", help="For the page and the plot. [%(default)s]")
    parser.add_argument("--rows", type=int, default=20, help="Rows whose answers are shown side by side. [%(default)s]")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    args = parse_words(parser, argv)
    if not args.runs:
        raise ValueError("Which runs? Give their folders: python ptuning/compare.py output/run-a output/run-b")
    if args.rows < 0:
        raise ValueError(f"--rows {args.rows}: expected 0 or more.")
    return args


# ---- reading runs


def read_object(file):
    """A JSON object from a file, {} where there is none; ValueError for anything else."""
    other = "no JSON object; is it a file that main.py wrote?"
    return read_json(file, "Was the run cut off there?", other) if file.is_file() else {}


def read_run(folder):
    """Read a run's folder: {"figures": {key: number}, "curves": {key: [(step, loss)]}, "answers": {place: row}}.

    ValueError and FileNotFoundError where a folder is none of main.py's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Give folders that main.py wrote, such as output/my-run.")
    trained = next((place for place in (folder, folder.parent) if (place / STATE_FILE).is_file()), folder)
    history = read_object(trained / STATE_FILE).get("log_history") or []
    if not is_history(history):
        raise ValueError(
            f"{trained / STATE_FILE}: log_history is {short_json(history)}, expected a list of logged losses, each with "
            "its step. Was that file changed?"
        )
    results = {**read_object(trained / RESULTS_FILE), **read_object(folder / RESULTS_FILE)}
    answers_file = folder / ANSWERS_FILE
    answers = {}
    if answers_file.is_file():
        for number, row in enumerate(read_rows(answers_file), start=1):
            if not isinstance(row.get("predict"), str) or not isinstance(row.get("labels"), str):
                raise ValueError(f"{answers_file} line {number} lacks the texts `labels` and `predict`.")
            place = row.get("row", number)
            if not is_count(place):
                raise ValueError(f"{answers_file} line {number}: row is {short_json(place)}, expected its number.")
            answers[str(row.get("dataset", "")), place] = row
    if not (history or results or answers):
        raise ValueError(
            f"{folder} has none of {STATE_FILE}, {RESULTS_FILE} and {ANSWERS_FILE}. Give a folder that main.py trained "
            "or predicted in, not one above it or a checkpoint in it."
        )
    curves = {key: [(entry["step"], entry[key]) for entry in history if key in entry] for key in CURVES}
    trained, total = (results.get(f"{kind}_parameters") for kind in ("trainable", "total"))
    if is_number(trained) and is_number(total) and trained and total:
        results["trained_share"] = trained / total
    base, data = trained_on(folder if list_checkpoints(folder) else folder.parent)
    scored = sorted((place, row["labels"]) for place, row in answers.items())
    return {
        "figures": {**results, **losses(curves)},
        "curves": curves,
        "answers": answers,
        "comparable": {"eval": (base, data), "predict": (base, scored)},
    }


def trained_on(folder):
    """(base model, digest of its training rows) of the run in a folder, "" for what its last checkpoint does not say."""
    checkpoints = list(list_checkpoints(folder).values())
    saved = read_sidecar(checkpoints[-1]) if checkpoints else {}
    training = saved.get("training")
    rows = training.get("train_rows") if isinstance(training, dict) else ""
    return str(saved.get("base_fingerprint") or saved.get("base_model") or ""), str(rows or "")


def losses(curves):
    """The figures of a run's losses."""
    figures = {}
    if curves["loss"]:
        figures["loss"] = curves["loss"][-1][1]
    if dev := curves["eval_loss"]:
        figures.update(
            first_eval_loss=dev[0][1], last_eval_loss=dev[-1][1], best_eval_loss=min(loss for _, loss in dev)
        )
    if points := curves["loss"] + curves["eval_loss"]:
        figures["steps"] = max(step for step, _ in points)
    return figures


def short_names(folders):
    """A name for each folder: the last parts of its path, as many as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [failure.printable("/".join(part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("The same run is named twice: " + ", ".join(map(str, folders)))


def shared_places(runs, limit):
    """Places, (data set, row), that every run with answers has answered: at most `limit`, spread over all of them."""
    answered = [run["answers"] for run in runs.values() if run["answers"]]
    if not answered or not limit:
        return []
    places = [place for place in answered[0] if all(place in answers for answers in answered)]
    step = max(1, len(places) // limit)
    return places[::step][:limit]


# ---- table, plot, page


def table(runs):
    """(titles, {name: texts}, {(name, index)} of the best of a column), for columns of which any run has a figure.

    A figure is the best among the runs on one base model and the same rows; alone there it is none.
    """
    columns = [column for column in COLUMNS if any(is_number(run["figures"].get(column[1])) for run in runs.values())]
    titles = [title for title, *_ in columns]
    texts, best = {name: [] for name in runs}, set()
    for index, (_, key, form, choose) in enumerate(columns):
        figures = {name: run["figures"].get(key) for name, run in runs.items()}
        figures = {name: value for name, value in figures.items() if is_number(value)}
        for name in runs:
            texts[name].append(form.format(figures[name]) if name in figures else "-")
        kind = "predict" if key.startswith("predict") else "eval"
        for group in {str(run["comparable"][kind]) for run in runs.values()} if choose else ():
            inside = {name: value for name, value in figures.items() if str(runs[name]["comparable"][kind]) == group}
            finite = [value for value in inside.values() if value == value]
            if len(finite) > 1:
                best.update((name, index) for name, value in inside.items() if value == choose(finite))
    return titles, texts, best


def text_table(titles, texts, columns=None):
    """Lines of a Markdown table, aligned. One wider than `columns` is turned, so that each run has a column, and divided.

    Names that are too wide even so are cut in the middle.
    """
    rows = [["run", *titles], *([name, *figures] for name, figures in texts.items())]
    if columns and width_of(rows) > columns:
        first = max(map(len, rows[0]))
        room = max(12, columns - first - 7)
        runs = [[shortened(row[0], room), *row[1:]] for row in rows[1:]]
        parts = [[]]
        for run in runs:
            if parts[-1] and width_of(turned([rows[0], *parts[-1], run])) > columns:
                parts.append([])
            parts[-1].append(run)
        return "\n\n".join(markdown(turned([rows[0], *part])) for part in parts)
    return markdown(rows)


def turned(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def width_of(rows):
    return sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)) + 1


def shortened(name, length):
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def markdown(rows):
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        f"| {name.ljust(widths[0])} | {' | '.join(map(str.rjust, figures, widths[1:]))} |" for name, *figures in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def draw(runs):
    """A PNG of the training and dev losses of all runs over their steps; None where no run has any."""
    kinds = [(key, title) for key, title in CURVES.items() if any(run["curves"][key] for run in runs.values())]
    if not kinds:
        return None
    figure, all_axes = new_figure(6 * len(kinds), 4.2, columns=len(kinds))
    for axes, (key, title) in zip(all_axes, kinds, strict=True):
        lines = {name.replace("$", r"\$"): run["curves"][key] for name, run in runs.items()}
        draw_lines(axes, lines, title=title, xlabel="step", ylabel="nats per token")
    return picture_of(figure)


def page(runs, titles, texts, best, picture, places):
    """The HTML page as text."""
    rows = []
    for name, figures in texts.items():
        rows.append([f"<td>{escape(name)}</td>"])
        for index, text in enumerate(map(escape, figures)):
            rows[-1].append(f"<td><b>{text}</b></td>" if (name, index) in best else f"<td>{text}</td>")
    parts = [html_table("figures", ["run", *titles], rows)]
    if best:
        parts.append("<p>" + both("Bold: the best among the runs on one base model and the same rows.") + "</p>")
    if picture:
        data = base64.b64encode(picture).decode()
        parts.append(f'<h2>{both("Losses")}</h2>\n<img alt="Losses over the steps" src="data:image/png;base64,{data}">')
    if places:
        answered = {name: run["answers"] for name, run in runs.items() if run["answers"]}
        rows = []
        for dataset, row in places:
            found = [answers[dataset, row] for answers in answered.values()]
            prompt = next((each["prompt"] for each in found if isinstance(each.get("prompt"), str)), "")
            place = f"<td>{escape(f'{dataset} {row}'.strip())}<small>{escape(prompt)}</small></td>"
            rows.append([place, answer_cell(found[0]["labels"], "reference")])
            rows[-1] += [answer_cell(answers[dataset, row]["predict"]) for answers in answered.values()]
        texts = html_table("answers", ["row and prompt", "reference", *answered], rows)
        parts.append(f"<h2>{both('Answers')}</h2>\n{texts}")
    count = len(runs)
    title, chinese = ("1 run", "1 次训练") if count == 1 else (f"{count} runs side by side", f"{count} 次训练的对比")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title} <span lang="zh">{chinese}</span></h1>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text):
    """Text for the page, without what HTML or a terminal would act upon."""
    return html.escape(failure.printable(text))


def html_table(kind, titles, rows):
    """A table of rows of cells, which are HTML; the titles are text."""
    head = "".join(f"<th>{both(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return (  # a region that scrolls can be reached by keys
        f'<div class="wide" role="region" aria-label="{kind}" tabindex="0"><table class="{kind}">\n'
        f"<tr>{head}</tr>\n{body}</table></div>"
    )


def both(text):
    """A text of the page in English and, where it is one of its own, in Chinese."""
    return escape(text) + (f' <span lang="zh">{CHINESE[text]}</span>' if text in CHINESE else "")


def answer_cell(text, kind=""):
    if not text:
        return '<td class="empty">(nothing)</td>'
    return f"<td{f' class={kind!r}' if kind else ''}>{escape(text)}</td>"


def main(argv):
    args = parse_arguments(argv)
    names = short_names(args.runs)
    runs = {name: read_run(folder) for name, folder in zip(names, args.runs, strict=True)}
    titles, texts, best = table(runs)
    print(text_table(titles, texts, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    places = shared_places(runs, args.rows)
    counts = {name: len(run["answers"]) for name, run in runs.items() if run["answers"]}
    if len(set(counts.values())) > 1 or (counts and args.rows and not places):
        numbers = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        print(f"The runs answered different rows ({numbers}); their scores are not comparable.")
    picture = draw(runs)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "comparison.html").write_text(page(runs, titles, texts, best, picture, places), encoding="utf-8")
    if picture:
        (output_dir / "comparison.png").write_bytes(picture)
    print(f"Wrote {output_dir / 'comparison.html'}" + (f" and {output_dir / 'comparison.png'}." if picture else "."))


if __name__ == "__main__":
    failure.run(main, sys.argv[1:])
