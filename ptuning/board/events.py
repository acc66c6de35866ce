"""What happens when a visitor of the training page looks at runs, starts, stops, evaluates or exports one, or opens the chat.

Nothing here remembers a run: every answer is read from files anew.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import gradio as gr

from board import show
from board.chat import Refused, check_room, outstanding_bytes
from board.choosing import Choices, settings_of, telling, told
from board.commands import (
    TINY,
    Command,
    checkpoint_of,
    compare_command,
    evaluation_command,
    export_command,
    method_of,
    model_of,
    remembered_by,
    script_variables,
    training_command,
)
from board.estimate import ask, free_memory, held_by, with_children
from board.files import PROJECT, free_name, run_name, shown_path
from board.runs import MOST_RUNS, RUNNING, answers_of, log_tail, message_in, read_run, results_of, tail_of
from board.starting import is_alive, log_file, output_of, read_record, runs_in, stop, writing_process
from board.words import said_in
from common.languages import is_chinese
from common.messages import cut_short, in_words
from data.held_out import words_for_held_out
from families import FAMILY_KEY

MOST_PAGE_BYTES = 16 * 2**20  # of a comparison
MOST_COMPARED = 8
ROWS_SHOWN = 20


class Page(Choices):
    """Handlers of the page's events; each catches what a visitor can cause and says it."""

    def __init__(self, roots, starter, chat):
        super().__init__(roots, starter.output)
        self.starter, self.chat = starter, chat

    def left(self, request: gr.Request):
        """A browser has closed the page."""
        self.chat.shown(request.session_hash, False)

    # ---- the run that is shown

    def folder(self, name) -> Path:
        """The folder of a run that a visitor names. ValueError where there is none."""
        folder = self.output / run_name(name)
        if not folder.is_dir() or folder.is_symlink():
            raise ValueError(f"There is no run {cut_short(str(name))!r} in output/.")
        return folder

    def shown_run(self, name):
        """The run that a visitor has chosen, None where there is none such."""
        with contextlib.suppress(ValueError, OSError):
            return read_run(self.folder(name))
        return None

    def tick(self, request: gr.Request, name, tab, seen):
        """All that files say now, for the tab that is shown; what has not changed is not sent again."""
        words, chinese = said_in(request), is_chinese(request)
        self.starter.reap()
        self.chat.shown(request.session_hash, tab == "chat")
        folders = runs_in(self.output)[:MOST_RUNS]
        names = [folder.name for folder in folders]
        run = self.shown_run(name) or (self.shown_run(names[0]) if names else None)
        name = run.name if run else None
        live = [read_run(folder) for folder in folders[:20] if folder.name != name]
        ours = bool(run and run.alive and run.ours)
        steps = [(words[key], value) for key, value in (("best_or_last", ""), ("best", "best"), ("last", "last"))]
        steps += [(str(step), str(step)) for step in (run.checkpoints if run else [])]
        values = {
            "run": {"choices": names, "value": name},
            "strip": show.strip([each for each in [run, *live] if each], words),
            "card": show.card(run, words, chinese),
            "plots": show.plots(run, words),
            "tail": show.pre(log_tail(run.folder), words["tail"]) if run else "",
            "stop": {"visible": ours},
            "continue": {"visible": bool(run and not run.alive and run.checkpoints)},
            "adopt": {"visible": bool(run and run.alive and not run.ours)},
            "end_evaluation": {"visible": bool(run and is_alive(read_record(run.folder, "evaluate")))},
            "step": {"choices": [*steps, (words["all"], "all")]},
            "chat_step": {"choices": steps},
            "export_step": {"choices": steps},
            "evaluated": self.evaluated(run, words) if tab == "evaluate" else None,
            "chat": self.chat_shown(words) if tab == "chat" else None,
            "exported": self.exported(run, words) if tab == "export" else None,
            "compared": {"choices": names},
        }
        seen, updates = dict(seen or {}), []
        for key, value in values.items():
            if value is None or seen.get(key) == value:
                updates.append(gr.skip())
                continue
            seen[key] = value
            updates.append(gr.update(**value) if isinstance(value, dict) else value)
        before, seen["alive"] = seen.get("alive"), bool(run and run.alive)
        said = "" if before and not seen["alive"] else gr.skip()  # "Started …" stands no longer
        return [*updates, said, seen]

    # ---- running

    def start(self, request: gr.Request, choice, *values):
        """(a line on it, the question what becomes of a run that is there, the run that is shown, its name)."""
        words = said_in(request)
        try:
            name, command = training_command(settings_of(values), self.roots, self.output)
            folder = self.output / name
            if choice == "name":
                name = free_name(self.output, name)
                command.variables["CHECKPOINT"], folder = name, self.output / name
            run = read_run(folder) if folder.is_dir() else None
            if run and run.checkpoints and not run.alive and choice not in ("continue", "overwrite"):
                line = words["ask_exists"].format(name=name, count=len(run.checkpoints))
                return show.said(line, "plain"), gr.update(visible=True, value=None), gr.skip(), gr.skip()
            if choice == "continue":
                command = command.extended("--resume_from_checkpoint", "last")
            self.starter.start(folder, "train", command)
        except (ValueError, OSError) as error:
            return told(error), gr.update(visible=False, value=None), gr.skip(), gr.skip()
        hidden = gr.update(visible=False, value=None)
        return show.said(words["started"].format(name=name)), hidden, gr.update(value=name), name

    @telling
    def stop(self, request: gr.Request, name):
        """Tell the run that is shown to finish its step, save and end."""
        stop(self.folder(name), "train")
        return show.said(said_in(request)["stopping"].format(name=name))

    @telling
    def go_on(self, request: gr.Request, name, *values):
        """Resume the run that is shown from its last checkpoint, with the command it had, else with the fields'."""
        folder = self.folder(name)
        record = read_record(folder)
        if record.get("words") is not None and record.get("program") and not record.get("adopted"):
            command = self.remembered(record)
        else:
            _, command = training_command({**settings_of(values), "name": name}, self.roots, self.output)
        if "--resume_from_checkpoint" not in command.words:
            command = command.extended("--resume_from_checkpoint", "last")
        self.starter.start(folder, "train", command)
        return show.said(said_in(request)["started"].format(name=name))

    def remembered(self, record):
        """The command in a record, whose file anybody who writes to output/ could have changed: only scripts of this project."""
        program, words, variables = record["program"], record["words"], record["variables"]
        scripts = {"train.sh", "finetune.sh", "train_preference.sh"}
        texts = [*program, *words, *variables, *variables.values()] if isinstance(words, list) else [None]
        if program[:1] != ["bash"] or len(program) != 2 or program[1] not in scripts:
            raise ValueError("web.json names no script of this project; start the run from the settings.")
        if not all(isinstance(text, str) for text in texts) or not variables.keys() <= script_variables():
            raise ValueError("web.json is damaged; start the run from the settings.")
        return Command(program, variables, words)

    @telling
    def adopt(self, request: gr.Request, name):
        """Let the run of a terminal be stopped here."""
        self.starter.adopt(self.folder(name))
        return show.said(said_in(request)["adopted"].format(name=name))

    # ---- evaluating

    @telling
    def evaluate(self, request: gr.Request, name, step, data, rows, prompt="", response="", history="", messages=""):
        """Start evaluate.sh for the run that is shown; the last four are the names of columns."""
        folder = self.folder(name)
        variables = read_run(folder).variables
        if variables.get("DEV_RATIO") and not data and not words_for_held_out(folder):  # trained by an earlier version
            return show.said(said_in(request)["held_out"].format(name=name), "bad")
        command = evaluation_command(
            folder, step or "", data, rows, variables, self.roots, (prompt, response, history, messages)
        )
        self.starter.start(folder, "evaluate", command)
        return ""

    @telling
    def stop_job(self, name, kind):
        """Stop the evaluation or the export of the run that is shown."""
        stop(self.folder(name), kind)
        return ""

    def evaluated(self, run, words):
        """Numbers and answers of the run that is shown, or what its evaluation says now."""
        if not run:
            return show.said(words["no_run_chosen"], "plain")
        parts, record = [], read_record(run.folder, "evaluate")
        if is_alive(record):
            parts += [
                show.said(words["evaluating"].format(name=run.name), "plain"),
                show.pre(log_tail(run.folder, "evaluate"), words["tail"]),
            ]
        elif record and (message := message_in(log_tail(run.folder, "evaluate"))):
            parts.append(show.said(message, "bad"))
        table = tail_of(run.folder / "all_checkpoints" / "table.txt")
        parts += [show.pre(table, words["all"]), show.metrics(results_of(run.folder), words)]
        return "".join([*parts, show.answers(answers_of(run.folder, ROWS_SHOWN), words)])

    @telling
    def compare(self, request: gr.Request, names):
        """compare.py's page on some runs."""
        words = said_in(request)
        folders = [self.folder(name) for name in (names if isinstance(names, list) else [])[:MOST_COMPARED]]
        if not folders:
            raise ValueError(words["no_run_chosen"])
        place = self.output / "_comparison"
        printed = output_of(compare_command(folders, place))
        if message := message_in(printed):
            return show.said(message, "bad")
        page = place / "comparison.html"
        if page.stat().st_size > MOST_PAGE_BYTES:
            raise ValueError(f"{page} is too long to be shown here; open it itself.")
        return show.framed(page.read_text(encoding="utf-8"), words["comparison"])

    # ---- chat

    @telling
    def open_chat(self, request: gr.Request, name, step):
        """Open the chat with a checkpoint, unless a run needs the memory."""
        words, folder = said_in(request), self.folder(name)
        checkpoint = checkpoint_of(folder, step or "")
        try:
            self.check_chat_room(folder)
        except Refused as refusal:
            more = {key: in_words(value) if isinstance(value, int) else value for key, value in refusal.more.items()}
            return show.said(words[refusal.name].format(**more), "bad")
        self.chat.shown(request.session_hash, True)
        self.chat.open(name, ["--ptuning_checkpoint", shown_path(checkpoint)])
        return ""

    def check_chat_room(self, folder):
        """Refused while a run needs the memory that the chat would take."""
        live = [run for run in map(read_run, runs_in(self.output)[:20]) if run.alive]
        if not live:
            return
        model = model_of(folder, read_run(folder).variables)
        place = PROJECT / (TINY if model == "tiny" else model)
        found = ask(
            model=str(place),
            family=remembered_by(folder, FAMILY_KEY),
            method=method_of(folder),
            bits=None,
            prefix=128,
            rows=1,
            source=1024,
            target=1023,
            trains=False,
        )
        free = free_memory().get(found["device"], 0)
        for run in live:
            pids = {read_record(run.folder).get("pid") if run.ours else writing_process(run.folder)}
            held = held_by(with_children(pids), found["device"])
            outstanding = outstanding_bytes(tail_of(log_file(run.folder, "train")), held)
            if outstanding is None and run.state == RUNNING:  # a terminal has its estimate
                outstanding = 0  # it holds what it takes by now
            check_room(run.name, sum(found["parts"].values()), free, outstanding)

    def end_chat(self):
        """End the chat for everybody."""
        self.chat.viewers.clear()
        self.chat.end()
        return ""

    def chat_shown(self, words):
        """The chat's page, or what is known of it."""
        chat = self.chat
        if chat.state == "open":
            return show.chat_frame("chat/", words["chat"])
        if chat.state == "failed":
            return show.said(message_in(chat.message) or chat.message[-500:], "bad")
        name = {"loading": "chat_loading", "ended": "chat_ended", "none": "chat_none"}[chat.state]
        return show.said(words[name].format(name=chat.name), "plain")

    # ---- export

    @telling
    def export(self, name, step, bits):
        """Start export_model.py for a checkpoint of the run that is shown."""
        folder = self.folder(name)
        target = free_name(self.output / "_exports", f"{folder.name}-{step or 'best'}")
        command = export_command(folder, step or "", bits, self.output / "_exports" / target)
        self.starter.start(folder, "export", command)
        return ""

    def exported(self, run, words):
        """Links to the files of a run's last export, or what it says now."""
        record = read_record(run.folder, "export") if run else {}
        listed = record.get("words") if isinstance(record.get("words"), list) else []
        if "--output_dir" not in listed[:-1]:
            return ""
        folder = (PROJECT / str(listed[listed.index("--output_dir") + 1])).resolve()
        if is_alive(record):
            return show.said(words["exporting"].format(name=run.name), "plain") + show.pre(
                log_tail(run.folder, "export"), words["tail"]
            )
        if not folder.is_relative_to((self.output / "_exports").resolve()) or not folder.is_dir():
            return show.said(message_in(log_tail(run.folder, "export")) or log_tail(run.folder, "export")[-500:], "bad")
        return show.said(words["exported"].format(folder=shown_path(folder))) + show.links(
            sorted(folder.iterdir())[:100], words
        )
