"""What happens when a visitor of the training page chooses, looks, starts, stops, evaluates or opens the chat.

Answers to nothing in the official scripts. Nothing here remembers a run: every answer is read from files anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

import gradio as gr

from board import show
from board.chat import Refused, check_room, outstanding_bytes
from board.commands import (
    EMPTY,
    PRESETS,
    TINY,
    Command,
    check_model,
    checked_settings,
    checkpoint_of,
    compare_command,
    evaluation_command,
    export_command,
    extra_words,
    families_of,
    known_flags,
    load_settings,
    method_of,
    model_of,
    remembered_family,
    script_variables,
    training_command,
)
from board.estimate import ask, free_memory, held_by, with_children
from board.files import PROJECT, columns_of, files_in, free_name, guessed, keep_upload, plain_text, run_name, shown_path
from board.runs import (
    MOST_RUNS,
    RUNNING,
    answers_of,
    log_tail,
    message_in,
    read_run,
    results_of,
    tail_of,
)
from board.starting import is_alive, log_file, output_of, read_record, runs_in, stop, writing_process
from board.words import words_for
from common.failure import describe
from common.messages import cut_short, in_words
from families import BY_NAME, SUPPORTED, read_base_settings

NAMES = tuple(EMPTY)  # the order in which every handler gets the settings; `sources` are a list
MOST_PAGE_BYTES = 16 * 2**20  # of a comparison
MOST_COMPARED = 8
ROWS_SHOWN = 20


def said_in(request) -> dict:
    """The texts in the language of a visitor's browser."""
    return words_for(request.headers.get("accept-language", ""))


def is_chinese(request) -> bool:
    return request.headers.get("accept-language", "").lower().startswith("zh")


def told(error: Exception) -> str:
    """A line on what was wrong, in the programs' words."""
    return show.said(re.sub(r" See python \S+ --help\.$", "", describe(error)[0]), "bad")


def planned(source: dict) -> str:
    """A file of rows with the columns that are read."""
    columns = [source[kind] for kind in ("messages", "prompt", "response") if source.get(kind)]
    return f"{source['path']} ({' → '.join(columns)})"


def settings_of(values) -> dict:
    """{name: value} of what the page's fields hold."""
    return dict(zip(NAMES, values, strict=True))


class Page:
    """Handlers of the page's events; each catches what a visitor can cause and says it."""

    def __init__(self, roots, starter, chat):
        self.roots, self.starter, self.chat = roots, starter, chat
        self.output = starter.output

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

    # ---- model

    def look_at_model(self, request: gr.Request, model, family=""):
        """(a tick with what the folder says, or the program's own message; the question which model it is)."""
        words, asked = said_in(request), gr.update(visible=False, value="")
        try:
            if found := families_of(model, self.roots):
                family = family if family in [each.name for each in found] else ""
                choices = [(each.title, each.name) for each in found]
                asked = gr.update(visible=True, value=family or None, choices=choices)
                if not family:
                    names = words["or"].join(each.title for each in found)
                    return show.said(words["model_which"].format(model=model, names=names), "bad"), asked
            model = check_model(model, self.roots, family if found else "")
            if model != "tiny" and not (PROJECT / model).is_dir():
                choices = [(words["family_told"], ""), *((BY_NAME[name].title, name) for name in SUPPORTED)]
                asked = gr.update(visible=True, choices=choices)
                return show.said(words["model_hub"].format(model=model), "plain"), asked
            folder = PROJECT / (TINY if model == "tiny" else model)
            settings, family = read_base_settings(folder, family if found else None)
        except (ValueError, OSError) as error:
            return told(error), asked
        bits = settings.get("quantization_bit")
        line = words["model_good"].format(
            model=model,
            family=family.title,
            layers=settings.get("num_layers"),
            hidden=settings.get("hidden_size"),
            bits=words["model_bits"].format(bits=bits) if bits else "",
        )
        return show.said(line), asked

    def estimate(self, request: gr.Request, *values):
        """The memory that the settings take, beside what is free."""
        words, settings = said_in(request), settings_of(values)
        try:
            settings = checked_settings(settings)
            model = check_model(settings["model"], self.roots, settings["family"])
            folder = PROJECT / (TINY if model == "tiny" else model)
            if not folder.is_dir():
                return show.said(words["memory_hub"], "plain")
            training_command(settings, self.roots, self.output)
            defaults = {"batch": 1, "prefix": 128, "source": 64, "target": 128}
            numbers = {
                name: int(settings[name]) if settings[name].isdecimal() else default
                for name, default in defaults.items()
            }
            found = ask(
                model=str(folder),
                family=settings["family"] or None,
                method=settings["method"],
                bits=int(settings["bits"]) if settings["bits"] else None,
                prefix=numbers["prefix"],
                rows=numbers["batch"],
                source=numbers["source"],
                target=numbers["target"],
                trains=True,
            )
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            return told(error)
        parts = ", ".join(
            f"{words.get(f'part {name}', name)} {in_words(size)}" for name, size in found["parts"].items()
        )
        free = free_memory().get(found["device"], 0)
        line = words["memory"].format(
            need=in_words(sum(found["parts"].values())),
            rows=numbers["batch"],
            parts=parts,
            free=in_words(free),
            device={"cuda": "GPU", "cpu": "CPU"}[found["device"]],
        )
        return show.said(line, "good" if sum(found["parts"].values()) < free else "bad")

    # ---- data

    def look_at_rows(self, request: gr.Request, path):
        """(what a file holds, the four dropdowns of columns, {"file", "dev", "folder"} of what was looked at)."""
        words = said_in(request)
        try:
            place = self.roots.checked(path, "The file of rows")
            found = files_in(place) if place.is_dir() else {"train": place}
            if "train" not in found:
                raise ValueError(f"{path} has no train.json, .jsonl or .csv in it. Name the file of rows itself.")
            columns, first, count = columns_of(found["train"])
        except (ValueError, OSError, RecursionError) as error:
            return [told(error), *[gr.skip()] * 4, None]
        likely = guessed(columns)
        rows = [[row.get(column, "") for column in columns[:8]] for row in first]
        counted = words["row" if count == 1 else "rows"].format(count="?" if count is None else f"{count:,}")
        text = show.said(counted) + show.table(columns[:8], rows, words["file"])
        choices = [(words["none"], ""), *((column, column) for column in columns)]
        dropdowns = [
            gr.update(choices=choices, value=likely[kind]) for kind in ("prompt", "response", "history", "messages")
        ]
        looked = {
            "file": shown_path(found["train"]),
            "dev": shown_path(found["dev"]) if "dev" in found else "",
            "folder": shown_path(place) if place.is_dir() else "",
        }
        return [text, *dropdowns, looked]

    def uploaded(self, request: gr.Request, file):
        """(path of a file that has come, what look_at_rows gives)."""
        try:
            kept = keep_upload(self.came(file), Path(file).name, self.output)
        except (ValueError, OSError) as error:
            return [gr.skip(), told(error), *[gr.skip()] * 4, None]
        path = str(kept.relative_to(PROJECT)) if kept.is_relative_to(PROJECT) else str(kept)
        return [path, *self.look_at_rows(request, str(kept))]

    def came(self, file) -> Path:
        """The file that gradio has written for an upload; ValueError for another path."""
        file, folder = Path(str(file)).resolve(), Path(os.environ.get("GRADIO_TEMP_DIR", "/nowhere")).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            raise ValueError("That is no file that this page was sent.")
        return file

    def use_rows(self, request: gr.Request, *values):
        """As choose_rows, in place of the rows that were chosen before."""
        return self.choose_rows(said_in(request), *values, adds=False)

    def add_rows(self, request: gr.Request, *values):
        """As choose_rows, beside the rows that were chosen before."""
        return self.choose_rows(said_in(request), *values, adds=True)

    def choose_rows(self, words, looked, sources, prompt, response, history, messages, share, adds):
        """(what is missing, the sources now, the folder of rows, the dev file, the share of dev rows)."""
        if not isinstance(looked, dict) or not looked.get("file"):
            return [show.said(words["look_first"], "bad"), *[gr.skip()] * 4]
        columns = {
            "prompt": prompt or "",
            "response": response or "",
            "history": history or "",
            "messages": messages or "",
        }
        if not prompt and not messages:
            return [show.said(words["columns_missing"], "bad"), *[gr.skip()] * 4]
        source = {"path": looked["file"], **columns, "share": str(share or "")}
        if adds:
            return ["", [*(sources or []), source][:8], "", gr.skip(), gr.skip()]
        dev = looked["dev"]
        return ["", [source], looked["folder"], dev, "" if dev else "0.05"]

    def rows_chosen(self, request: gr.Request, sources):
        """A table of the rows that train."""
        words = said_in(request)
        if not sources:
            return show.said(words["chosen_none"], "plain")
        keys = ("path", "prompt", "response", "history", "messages", "share")
        rows = [[source.get(key, "") for key in keys] for source in sources if isinstance(source, dict)]
        titles = [words["file"], *(words[key] for key in keys[1:])]
        return show.said(words["chosen"], "plain") + show.table(titles, rows, words["chosen"])

    def check_rows(self, request: gr.Request, *values):
        """What --check_data says of the rows, with the part that is learned highlighted."""
        words = said_in(request)
        try:
            _, command = training_command(settings_of(values), self.roots, self.output)
            command.variables["NUM_GPUS"] = "1"
            printed = output_of(command.extended("--check_data"))
        except (ValueError, OSError) as error:
            return told(error)
        if message := message_in(printed):
            return show.said(message, "bad") + show.pre(printed, words["check"])
        return show.marked(printed, words["check"])

    # ---- settings

    def refresh(self, request: gr.Request, *values):
        """(the command, what is wrong with it, the settings for the browser to keep, a line on what would train)."""
        words, settings = said_in(request), settings_of(values)
        try:
            _, command = training_command(settings, self.roots, self.output)
        except (ValueError, OSError) as error:
            return "", told(error), settings, ""
        model, rows = command.variables["MODEL"], ", ".join(map(planned, settings["sources"])) or settings["data"]
        default = "AdvertiseGen/sample" if model == "tiny" else "AdvertiseGen"
        line = words["planned" if rows else "planned_default"].format(model=model, rows=rows or default)
        return command.text, "", settings, show.said(line, "plain")

    def preset(self, name, *values):
        """The fields with the values of a preset."""
        before, preset = settings_of(values), PRESETS.get(name, {})
        of_presets = {each.get("extra") for each in PRESETS.values()}  # lines that came with another preset go with it
        lines = [line for line in str(before["extra"] or "").splitlines() if line not in of_presets]
        extra = "\n".join([*lines, *filter(None, [preset.get("extra")])])
        chosen = {**before, **preset, "extra": extra}
        return [chosen[field] for field in NAMES]

    def restore(self, kept):
        """The fields as the browser kept them."""
        try:
            settings = checked_settings({name: kept[name] for name in NAMES if isinstance(kept, dict) and name in kept})
        except (ValueError, OSError):
            settings = dict(EMPTY)
        return [settings[name] for name in NAMES]

    def load(self, request: gr.Request, file):
        """(the fields as a settings.json says, a line on how that went)."""
        try:
            settings = load_settings(self.came(file))
        except (ValueError, OSError) as error:
            return [*[gr.skip()] * len(NAMES), told(error)]
        return [*[settings[name] for name in NAMES], show.said(said_in(request)["loaded"])]

    def flag_help(self, name):
        """The help line of a flag, with its default and choices."""
        flag = known_flags().get(str(name))
        if not flag:
            return ""
        more = [f"[{flag.default}]" if flag.default not in (None, "") else "", ", ".join(map(str, flag.choices or []))]
        return show.said(" ".join(filter(None, [f"--{flag.name}: {' '.join(flag.help.split())}", *more])), "plain")

    def add_flag(self, name, value, extra):
        """(the lines of further flags with one more, what is wrong with it)."""
        extra = str(extra or "")
        lines = [line for line in extra.splitlines() if line.partition("=")[0].strip() != name]
        try:
            line = f"{plain_text(name, 'The flag')} = {plain_text(value, 'Its value')}".removesuffix(" = ")
            extra_words("\n".join([*lines, line]), self.roots)
        except (ValueError, OSError) as error:
            return gr.skip(), told(error)
        return "\n".join([*lines, line]), ""

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

    def stop(self, request: gr.Request, name):
        """Tell the run that is shown to finish its step, save and end."""
        try:
            stop(self.folder(name), "train")
        except (ValueError, OSError) as error:
            return told(error)
        return show.said(said_in(request)["stopping"].format(name=name))

    def go_on(self, request: gr.Request, name, *values):
        """Resume the run that is shown from its last checkpoint, with the command it had, else with the fields'."""
        words = said_in(request)
        try:
            folder = self.folder(name)
            record = read_record(folder)
            if record.get("words") is not None and record.get("program") and not record.get("adopted"):
                command = self.remembered(record)
            else:
                _, command = training_command({**settings_of(values), "name": name}, self.roots, self.output)
            if "--resume_from_checkpoint" not in command.words:
                command = command.extended("--resume_from_checkpoint", "last")
            self.starter.start(folder, "train", command)
        except (ValueError, OSError) as error:
            return told(error)
        return show.said(words["started"].format(name=name))

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

    def adopt(self, request: gr.Request, name):
        """Let the run of a terminal be stopped here."""
        try:
            self.starter.adopt(self.folder(name))
        except (ValueError, OSError) as error:
            return told(error)
        return show.said(said_in(request)["adopted"].format(name=name))

    # ---- evaluating

    def evaluate(self, request: gr.Request, name, step, data, rows):
        """Start evaluate.sh for the run that is shown."""
        try:
            folder = self.folder(name)
            variables = read_run(folder).variables
            if variables.get("DEV_RATIO") and not data:
                return show.said(said_in(request)["held_out"].format(name=name), "bad")
            command = evaluation_command(folder, step or "", data, rows, variables, self.roots)
            self.starter.start(folder, "evaluate", command)
        except (ValueError, OSError) as error:
            return told(error)
        return ""

    def stop_job(self, name, kind):
        """Stop the evaluation or the export of the run that is shown."""
        try:
            stop(self.folder(name), kind)
        except (ValueError, OSError) as error:
            return told(error)
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

    def compare(self, request: gr.Request, names):
        """compare.py's page on some runs."""
        words = said_in(request)
        try:
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
        except (ValueError, OSError) as error:
            return told(error)

    # ---- chat

    def open_chat(self, request: gr.Request, name, step):
        """Open the chat with a checkpoint, unless a run needs the memory."""
        words = said_in(request)
        try:
            folder = self.folder(name)
            checkpoint = checkpoint_of(folder, step or "")
            self.check_chat_room(folder)
        except Refused as refusal:
            more = {key: in_words(value) if isinstance(value, int) else value for key, value in refusal.more.items()}
            return show.said(words[refusal.name].format(**more), "bad")
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            return told(error)
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
            family=remembered_family(folder),
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
            if (
                outstanding is None and run.state == RUNNING
            ):  # a terminal has its estimate; it holds what it takes by now
                outstanding = 0
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

    def export(self, name, step, bits):
        """Start export_model.py for a checkpoint of the run that is shown."""
        try:
            folder = self.folder(name)
            target = free_name(self.output / "_exports", f"{folder.name}-{step or 'best'}")
            command = export_command(folder, step or "", bits, self.output / "_exports" / target)
            self.starter.start(folder, "export", command)
        except (ValueError, OSError) as error:
            return told(error)
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
