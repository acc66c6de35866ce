"""What happens when a visitor of the training page chooses: model, rows, settings. It says what they mean, and starts no run.

events.py has what happens to runs.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import gradio as gr

from board import show
from board.commands import (
    EMPTY,
    PRESETS,
    base_of,
    checked_settings,
    extra_words,
    known_flags,
    load_settings,
    rows_by_default,
    training_command,
)
from board.estimate import ask, free_memory
from board.files import COLUMNS, PROJECT, columns_of, files_in, guessed, keep_upload, plain_text, shown_path
from board.runs import message_in
from board.starting import output_of
from board.words import said_in
from common.failure import WrongFlags, describe
from common.files import read_json
from common.messages import in_words
from families import BY_NAME, SUPPORTED, base_family, told_families

NAMES = tuple(EMPTY)  # the order in which every handler gets the settings; `sources` are a list


def told(error: Exception) -> str:
    """A line on what was wrong, in the programs' words; where flags are listed, a visitor of a page need not know."""
    return show.said(error.args[0] if isinstance(error, WrongFlags) else describe(error)[0], "bad")


def telling(handler):
    """A handler that answers with told() where settings, files or programs cannot be used as a visitor wants."""

    @functools.wraps(handler)
    def answer(*values):
        try:
            return handler(*values)
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            return told(error)

    return answer


def planned(source: dict) -> str:
    """A file of rows with the columns that are read."""
    columns = [source[kind] for kind in ("messages", "prompt", "response") if source.get(kind)]
    return f"{source['path']} ({' → '.join(columns)})"


def settings_of(values) -> dict:
    """{name: value} of what the page's fields hold."""
    return dict(zip(NAMES, values, strict=True))


class Choices:
    """Handlers of the tabs on model, data and settings; each catches what a visitor can cause and says it."""

    def __init__(self, roots, output: Path):
        self.roots, self.output = roots, output

    # ---- model

    def look_at_model(self, request: gr.Request, model, family=""):
        """(a tick with what the folder says, or the program's own message; the question which model it is)."""
        words, asked = said_in(request), gr.update(visible=False, value="")
        try:
            model, folder = base_of(model, self.roots)
            if folder is None:
                choices = [(words["family_told"], ""), *((BY_NAME[name].title, name) for name in SUPPORTED)]
                asked = gr.update(visible=True, choices=choices)
                return show.said(words["model_hub"].format(model=model), "plain"), asked
            settings = read_json(folder / "config.json")
            found = told_families(settings, folder)
            if len(found) > 1:
                family = family if family in [each.name for each in found] else ""
                choices = [(each.title, each.name) for each in found]
                asked = gr.update(visible=True, value=family or None, choices=choices)
                if not family:
                    names = words["or"].join(each.title for each in found)
                    return show.said(words["model_which"].format(model=model, names=names), "bad"), asked
            family = base_family(settings, folder, family if len(found) > 1 else None)
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

    @telling
    def estimate(self, request: gr.Request, *values):
        """The memory that the settings take, beside what is free."""
        words, settings = said_in(request), checked_settings(settings_of(values))
        _, folder = base_of(settings["model"], self.roots)
        if not folder:
            return show.said(words["memory_hub"], "plain")
        training_command(settings, self.roots, self.output)
        defaults = {"batch": 1, "prefix": 128, "source": 64, "target": 128}
        numbers = {
            name: int(settings[name]) if settings[name].isdecimal() else default for name, default in defaults.items()
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
        dropdowns = [gr.update(choices=choices, value=likely[kind]) for kind in COLUMNS]
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
        if not prompt and not messages:
            return [show.said(words["columns_missing"], "bad"), *[gr.skip()] * 4]
        columns = [column or "" for column in (prompt, response, history, messages)]
        source = {"path": looked["file"], **dict(zip(COLUMNS, columns, strict=True)), "share": str(share or "")}
        if adds:
            return ["", [*(sources or []), source][:8], "", gr.skip(), gr.skip()]
        dev = looked["dev"]
        return ["", [source], looked["folder"], dev, "" if dev else "0.05"]

    def rows_chosen(self, request: gr.Request, sources):
        """A table of the rows that train."""
        words = said_in(request)
        if not sources:
            return show.said(words["chosen_none"], "plain")
        keys = ("path", *COLUMNS, "share")
        rows = [[source.get(key, "") for key in keys] for source in sources if isinstance(source, dict)]
        titles = [words["file"], *(words[key] for key in keys[1:])]
        return show.said(words["chosen"], "plain") + show.table(titles, rows, words["chosen"])

    @telling
    def check_rows(self, request: gr.Request, *values):
        """What --check_data says of the rows, with the part that is learned highlighted."""
        words = said_in(request)
        _, command = training_command(settings_of(values), self.roots, self.output)
        command.variables["NUM_GPUS"] = "1"
        printed = output_of(command.extended("--check_data"))
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
        line = words["planned" if rows else "planned_default"]
        line = line.format(model=model, rows=rows or rows_by_default(command))
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
