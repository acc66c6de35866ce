"""What a run's folder says about the run: how far it is, its curves, how it ended and why. Files only.

trainer_log.jsonl tells while a run goes on, web.json which process it is, and what the process has printed why it
ended. Each may be damaged, half written or a stranger's: what cannot be read is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from board.files import PROJECT
from board.starting import LOCK_FILE, is_alive, log_file, read_record, writing_process
from checkpoints.run_folder import checkpoint_folders, step_of
from common.failure import printable
from common.files import ANSWERS_FILE, LOG_FILE, RESULTS_FILE, read_json
from common.values import is_count, is_number

MOST_LOG_BYTES = 8 * 2**20  # of trainer_log.jsonl; 30,000 lines
MOST_TAIL_BYTES = 2**16
MOST_TAIL_LINES = 200
MOST_POINTS = 400  # of a curve
MOST_RUNS = 200  # shown
CURVES = ("loss", "eval_loss", "drift", "learning_rate")
STARTING, RUNNING, STOPPING, FINISHED, STOPPED, FAILED, KILLED, UNKNOWN = (
    "starting running stopping finished stopped failed killed unknown".split()
)


@dataclass
class Run:
    """A run as its files tell it."""

    name: str
    folder: Path
    state: str = UNKNOWN
    alive: bool = False
    ours: bool = False  # started or adopted by the page: it can be stopped here
    phase: str = ""
    step: int = 0
    total: int = 0
    elapsed: str = ""
    remaining: str = ""
    curves: dict = field(default_factory=dict)  # {name: [(step, value)]}
    reason: str = ""  # of the end record
    message: str = ""  # of the program
    command: str = ""
    variables: dict = field(default_factory=dict)
    checkpoints: list = field(default_factory=list)  # steps

    def latest(self, name: str):
        """The last value of a curve, None where there is none."""
        return self.curves[name][-1][1] if self.curves.get(name) else None


def tail_of(file: Path, most: int = MOST_TAIL_BYTES, start: int = 0) -> str:
    """The end of a text file from byte `start` on, at most `most` bytes; "" where there is none."""
    try:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(start, size - most))
            return opened.read(most).decode("utf-8", errors="replace")
    except OSError:
        return ""


def log_tail(folder: Path, kind: str = "train") -> str:
    """The last lines that a process of a run has printed since its start, without what steers a terminal."""
    begins = read_record(folder, kind).get("log_from")
    printed = tail_of(log_file(folder, kind), start=begins if is_count(begins) else 0)
    lines = printed.replace("\r\n", "\n").split("\n")
    lines = [line.rpartition("\r")[2][:1000] for line in lines]  # of a bar its last state
    return printable("\n".join(lines[-MOST_TAIL_LINES:])).strip("\n")


def read_log(folder: Path) -> list[dict]:
    """The entries of trainer_log.jsonl; a line that is none is left out."""
    entries = []
    for line in tail_of(folder / LOG_FILE, MOST_LOG_BYTES).split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and is_count(entry.get("current_steps")):
                entries.append(entry)
    return entries


def thinned(points: list) -> list:
    """At most MOST_POINTS of a curve, its last one among them."""
    step = -(-len(points) // MOST_POINTS)
    return points[: len(points) - 1 : max(1, step)] + points[-1:] if len(points) > MOST_POINTS else points


def curves_of(entries: list[dict]) -> dict[str, list]:
    """{name: [(step, value)]} of what is plotted, with numbers only."""
    return {
        name: thinned(
            [
                (entry["current_steps"], entry[name])
                for entry in entries
                if is_number(entry.get(name)) and abs(entry[name]) < float("inf")
            ]
        )
        for name in CURVES
    }


def short_text(value) -> str:
    return printable(value)[:300] if isinstance(value, str) else ""


def message_in(text: str) -> str:
    """The last message behind `error:` in what a program has printed, "" where there is none."""
    found = list(re.finditer(r"^(?:bash: )?error: ", text, re.MULTILINE))
    if not found:
        return ""
    lines = text[found[-1].start() :].strip().split("\n")[:8]
    return printable("\n".join(line[:500] for line in lines))


def read_run(folder: Path) -> Run:
    """Everything that is known of the run in a folder."""
    record, entries = read_record(folder), read_log(folder)
    run = Run(folder.name, folder, command=record.get("command", ""))
    run.variables = {name: value for name, value in record.get("variables", {}).items() if isinstance(value, str)}
    ours = is_alive(record)
    run.alive = ours or bool(writing_process(folder))
    run.ours = ours
    with contextlib.suppress(OSError):
        run.checkpoints = sorted(map(step_of, checkpoint_folders(folder)))
    begun_anew = fresh(record, folder, elsewhere=run.alive and not ours)
    if not begun_anew or run.alive:
        run.curves = curves_of(entries)
    if entries:
        last = entries[-1]
        run.step = last["current_steps"]
        run.total = last["total_steps"] if is_count(last.get("total_steps")) else 0
        run.elapsed, run.remaining = short_text(last.get("elapsed_time")), short_text(last.get("remaining_time"))
    phases = [entry for entry in entries if isinstance(entry.get("phase"), str)]
    ended = bool(phases) and phases[-1]["phase"] == "end"
    run.phase = short_text(phases[-1]["phase"]) if phases else ""
    begins = record.get("log_from")
    printed = tail_of(log_file(folder, "train"), start=begins if is_count(begins) else 0)
    if run.alive:
        run.state = STARTING if begun_anew or not entries else RUNNING
        if run.state == STARTING:
            run.phase = ""
        if re.search(r"^SIG\w+: finishing this step", printed, re.MULTILINE):
            run.state = STOPPING
        return run
    run.message = message_in(printed)
    if ended and not begun_anew:
        run.reason = short_text(phases[-1].get("reason"))
        run.state = state_of(run.reason)
    elif record.get("pid") or entries:
        run.state = FAILED if run.message else KILLED
        stopped = re.findall(r"^Stopped by SIG\w+\.$|^Interrupted\.$|^SIG\w+: stopped .*$", printed, re.MULTILINE)
        if not run.message and stopped:
            run.state, run.reason = STOPPED, stopped[-1][:300]
        elif not run.message and record.get("status") == 0:
            run.state = FINISHED
    return run


def fresh(record, folder, elsewhere):
    """True where the process of a run has not written trainer_log.jsonl yet: what is there is of an earlier one.

    `elsewhere`: the process is that of a terminal, which writes its lock when it begins.
    """
    began = record.get("time")
    try:
        if elsewhere or record.get("adopted"):
            began = (folder / LOCK_FILE).stat().st_mtime
        return is_number(began) and (folder / LOG_FILE).stat().st_mtime < began
    except OSError:
        return is_number(began)


def state_of(reason: str) -> str:
    """The state that the reason of an end record means."""
    if reason.startswith(("finished", "stopped early")):
        return FINISHED
    if re.match(r"SIG\w+: stopped after the last step", reason):
        return FINISHED
    return STOPPED if re.match(r"SIG|Stopped by|Interrupted", reason) else FAILED


# ---- results


def results_of(folder: Path) -> dict[str, float]:
    """{name: number} of what a run measured."""
    found = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = read_json(folder / RESULTS_FILE)
    return {short_text(name)[:60]: value for name, value in list(found.items())[:60] if is_number(value)}


def answers_of(folder: Path, most: int) -> list[dict]:
    """The first answers of a run beside prompt and reference; lines that are none are left out."""
    rows = []
    with contextlib.suppress(OSError):
        with open(folder / ANSWERS_FILE, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line[:100_000])
                    if isinstance(row, dict):
                        rows.append(
                            {key: printable(str(row.get(key, "")))[:2000] for key in ("prompt", "labels", "predict")}
                        )
                if len(rows) >= most:
                    break
    return rows


# ---- what to do about a message


def advice_for(message: str, chinese: bool) -> str:
    """What docs/troubleshooting.md says about a message, "" where no row of its tables has its words."""
    page = PROJECT / f"docs/troubleshooting{'_zh' if chinese else ''}.md"
    try:
        text = page.read_text(encoding="utf-8")
    except OSError:
        return ""
    said, best = set(words_of(message)), (0, "")
    for row in re.findall(r"^\| (`.*) \| (.+) \|$", text, re.MULTILINE):
        for pattern in re.findall(r"`([^`]+)`", row[0]):
            words = words_of(pattern)
            found = sum(word in said for word in words)
            if len(words) >= 2 and found >= 0.8 * len(words) and found > best[0]:
                advice = re.sub(r"\[[^]]*\]\(#[^)]*\)", page.relative_to(PROJECT).as_posix(), row[1])
                best = found, re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", advice)
    return best[1]


def words_of(text):
    """The words by which a message is known again: neither numbers nor one letter."""
    return [word for word in re.findall(r"[A-Za-z_]{2,}", text) if not word.isdigit()]
