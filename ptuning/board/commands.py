"""Settings of the page -> the one command that they mean: a script, variables in front of it, words behind it.

No shell reads what a visitor typed: the script is started with a list of words and an environment. `Command.text` is
the same command as one would type it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from arguments import flags_of_main, parse_flags
from board.files import (
    COLUMNS,
    MAX_SOURCES,
    OUTPUT,
    PROJECT,
    Roots,
    files_in,
    link_rows,
    plain_text,
    run_name,
    shown_path,
)
from chatglm2.bits import SUPPORTED_BITS
from checkpoints.sidecar import finetuning_type, read_sidecar
from checkpoints.ways import DEFAULT_METHOD, RULES, TRAINED
from common.files import read_json
from common.messages import cut_short
from common.quoting import NEEDS_EQUALS, as_typed
from data.held_out import FOLDER as HELD_OUT
from data.held_out import words_for_held_out
from families import SUPPORTED, local_folder, read_base_settings

TINY = "ptuning/tiny"
STAGES = ("sft", "rm", "dpo", "ppo")
MAX_EXTRA = 60  # further flags
MAX_SETTINGS_BYTES = 2**16
# Field -> (the variable of the scripts that it sets, the flag behind that).
NUMBERS = {
    "steps": ("MAX_STEPS", "max_steps"),
    "batch": ("BATCH_SIZE", "per_device_train_batch_size"),
    "accumulation": ("ACCUMULATION", "gradient_accumulation_steps"),
    "lr": ("LR", "learning_rate"),
    "prefix": ("PRE_SEQ_LEN", "pre_seq_len"),
    "source": ("MAX_SOURCE_LENGTH", "max_source_length"),
    "target": ("MAX_TARGET_LENGTH", "max_target_length"),
    "save": ("SAVE_STEPS", "save_steps"),
}
EMPTY = {
    "model": "tiny",
    "family": "",
    "sources": [],
    "data": "",
    "dev": "",
    "dev_ratio": "",
    **dict.fromkeys(NUMBERS, ""),
    "epochs": "",
    "method": DEFAULT_METHOD,
    "stage": "sft",
    "bits": "",
    "gpus": "",
    "start": "",
    "name": "",
    "extra": "",
}


def numbers(text):
    """The values of NUMBERS, in their order."""
    return dict(zip(NUMBERS, text.split(), strict=True))


OFFICIAL = {**numbers("3000 1 16 2e-2 128 64 128 1000"), "bits": "4"}
PRESETS = {
    "tiny": {"model": "tiny", **numbers("200 16 1 2e-2 32 64 64 100"), "bits": "", "gpus": "1"},
    "one_gpu": {**OFFICIAL, "batch": "auto", "gpus": "1"},
    "eight_gpus": {**OFFICIAL, "batch": "2", "accumulation": "1", "gpus": "8"},
    "official": {**OFFICIAL, "gpus": "1", "extra": "precision = official"},
}
# The page itself decides these; as further flags they would make its command another one.
OWNED = {
    *(flag for _, flag in NUMBERS.values()),
    *("model_name_or_path train_file validation_file test_file dataset dataset_dir mix_ratios dev_ratio").split(),
    *("prompt_column response_column history_column messages_column output_dir overwrite_output_dir stage").split(),
    *("finetuning_type quantization_bit do_train do_eval do_predict check_data ptuning_checkpoint debug").split(),
    *("num_train_epochs resume_from_checkpoint model_family").split(),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
BITS = ("", *map(str, reversed(SUPPORTED_BITS)))


@dataclass
class Command:
    """A program, its words, and the environment variables in front of it."""

    program: list[str]  # such as ["bash", "train.sh"]
    variables: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The command as it is typed in the project's folder."""
        before = [f"{name}={as_typed(value) if value else ''}" for name, value in self.variables.items()]
        return " ".join([*before, *map(as_typed, self.program), *map(as_typed, self.words)])

    def extended(self, *words: str) -> Command:
        return Command(self.program, self.variables, [*self.words, *words])


def script_variables() -> set[str]:
    """The names of all variables that the scripts read: none of them may come in unseen from the page's own environment."""
    text = "".join(file.read_text(encoding="utf-8") for file in PROJECT.glob("*.sh"))
    return set(re.findall(r"\b([A-Za-z_]+)=\$\{\1:?-", text)) | {"typed_flags"}


def rows_by_default(command: Command) -> str:
    """The folder of rows that the script of a command takes where DATA is not set; with tiny its settings decide."""
    script = "ptuning/tiny/settings.sh" if command.variables["MODEL"] == "tiny" else command.program[-1]
    return re.search(r"^DATA=\$\{DATA:-(.*?)\}", (PROJECT / script).read_text(encoding="utf-8"), re.MULTILINE)[1]


# ---- what a visitor chose


def base_of(text, roots: Roots) -> tuple[str, Path | None]:
    """(the base model as MODEL takes it, its folder; None for one on a hub). ValueError and FileNotFoundError."""
    text = plain_text(text, "The model")
    if text in ("", "tiny", TINY):
        return "tiny", PROJECT / TINY
    if HUB_ID.fullmatch(text) and not (PROJECT / text).exists():
        return text, None
    folder = roots.checked(text, "The model")
    return shown_path(folder), local_folder(str(folder))


def check_model(text, roots: Roots, family: str = "") -> str:
    """The base model as MODEL takes it; `family` is as --model_family. ValueError and FileNotFoundError in the programs' words."""
    model, folder = base_of(text, roots)
    if folder and model != "tiny":
        read_base_settings(folder, family or None)
    return model


def checked_settings(values: dict) -> dict:
    """All fields of EMPTY, as bounded plain text, from what a browser or a file says. ValueError names the field."""
    if not isinstance(values, dict):
        raise ValueError("The settings must be one JSON object.")
    unknown = sorted(map(str, values.keys() - EMPTY.keys()))
    if unknown:
        raise ValueError(f"The settings have {unknown[0][:40]!r}, which this page does not know.")
    settings = {**EMPTY, **values}
    sources = settings["sources"]
    if not isinstance(sources, list) or len(sources) > MAX_SOURCES:
        raise ValueError(f"sources: expected a list of at most {MAX_SOURCES} files of rows.")
    keys = ("path", *COLUMNS, "share")
    checked = []
    for source in sources:
        if not isinstance(source, dict) or not source.get("path"):
            raise ValueError("sources: each needs a path.")
        checked.append({key: plain_text(source.get(key), f"sources: {key}") for key in keys})
    extra = settings["extra"]
    if not isinstance(extra, str) or len(extra) > 100 * MAX_EXTRA:
        raise ValueError(f"Further flags: expected at most {MAX_EXTRA} lines of text.")
    texts = {name: plain_text(value, name) for name, value in settings.items() if name not in ("sources", "extra")}
    for name, choices in (("method", TRAINED), ("stage", STAGES), ("bits", BITS), ("family", ["", *SUPPORTED])):
        if texts[name] not in choices:
            raise ValueError(f"{name} {cut_short(texts[name])!r}: expected one of {', '.join(filter(None, choices))}.")
    return {**texts, "sources": checked, "extra": extra}


def load_settings(file: Path) -> dict:
    """The settings in a file. Raises as checked_settings."""
    if Path(file).stat().st_size > MAX_SETTINGS_BYTES:
        raise ValueError(f"{Path(file).name} is no settings.json of this page: it is too long.")
    return checked_settings(read_json(file))


def known_flags() -> dict:
    """{name: Flag} of main.py that may be set as further ones."""
    known = {name: flag for group in flags_of_main().values() for name, flag in group.items()}
    return {name: flag for name, flag in known.items() if name not in OWNED}


def extra_words(text: str, roots: Roots) -> list[str]:
    """The words that lines of `name = value` mean. ValueError for an unknown flag, or a path outside the allowed folders."""
    known, words = known_flags(), []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > MAX_EXTRA:
        raise ValueError(f"Further flags: {len(lines)} lines, expected at most {MAX_EXTRA}.")
    for line in lines:
        name, _, value = (part.strip() for part in line.partition("="))
        name, value = name.removeprefix("--").replace("-", "_"), plain_text(value, name)
        if name in OWNED:
            raise ValueError(f"Further flags: {name} has a field of its own on this page. Set it there.")
        if name not in known:
            raise ValueError(f"Further flags: {name[:60]!r} is none of main.py's. Choose one from the list.")
        values = value.split() if "list" in known[name].type else [value]
        for each in values:
            if "/" in each or each.startswith(("~", ".")) or (each and (PROJECT / each).exists()):
                roots.checked(each, f"--{name}")
        if "list" in known[name].type and any(each.startswith("-") for each in values):
            raise ValueError(f"Further flags: {name} takes values, not flags.")
        if not value:
            words.append(f"--{name}")
        elif "list" not in known[name].type and NEEDS_EQUALS.match(value):
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", *values]
    return words


# ---- the commands


def training_command(values: dict, roots: Roots, output: Path | None = None) -> tuple[str, Command]:
    """(name of the run, the command that trains it). Raises what the settings make impossible, before anything starts."""
    settings = checked_settings(values)
    variables = {"MODEL": check_model(settings["model"], roots, settings["family"])}
    words = ["--model_family", settings["family"]] if settings["family"] else []
    words += data_words(settings, variables, roots, output)
    for name, (variable, _) in NUMBERS.items():
        if settings[name]:
            variables[variable] = settings[name]
    if settings["epochs"]:
        variables["MAX_STEPS"] = "-1"
        words += ["--num_train_epochs", settings["epochs"]]
    for variable, value in (("QUANTIZATION_BIT", settings["bits"]), ("NUM_GPUS", settings["gpus"])):
        if value:
            variables[variable] = value
    if not settings["bits"]:
        variables["QUANTIZATION_BIT"] = ""
    program = ["bash", "train.sh"]
    method, stage = settings["method"], settings["stage"]
    start = start_of(settings["start"], roots, output)
    if stage != "sft":
        program = ["bash", "train_preference.sh"]
        variables |= {"STAGE": stage, "FINETUNING_TYPE": method}
        if start:
            variables["START"] = start
    else:
        if not RULES[method].needs_prefix:
            program = ["bash", "finetune.sh"]
            variables["FINETUNING_TYPE"] = method
            variables.pop("PRE_SEQ_LEN", None)
        if start:
            words += ["--ptuning_checkpoint", start]
            if RULES[method].needs_prefix:  # whose prefix has its own length
                variables["with_prefix"] = ""
                variables.pop("PRE_SEQ_LEN", None)
    words += extra_words(settings["extra"], roots)
    name = run_name(settings["name"] or default_name(settings, variables))
    variables["CHECKPOINT"] = name
    check_flags(settings, variables, words)
    return name, Command(program, variables, words)


def start_of(text, roots, output):
    """The run or checkpoint to start from, as the scripts take it: a path, or the name of a run. "" for none."""
    if not text:
        return ""
    named = (output or OUTPUT) / text
    if "/" not in text and not (PROJECT / text).exists() and named.is_dir():
        text = str(named)
    path = roots.checked(text, "The run to start from")
    if not path.is_dir():
        raise FileNotFoundError(f"There is no run and no checkpoint {cut_short(text)!r} to start from.")
    return shown_path(path)


def default_name(settings, variables):
    """A name for the run that says model and way."""
    model = re.sub(r"[^\w.+-]+", "-", Path(variables["MODEL"]).name).strip("-._") or "model"
    stage = "" if settings["stage"] == "sft" else f"{settings['stage']}-"
    return f"{stage}{model}-{'pt' if RULES[settings['method']].needs_prefix else settings['method']}"


def data_words(settings, variables, roots, output):
    """The words about the rows; `variables` get DATA and the columns."""
    sources = settings["sources"]
    dev = roots.checked(settings["dev"], "The dev file") if settings["dev"] else None
    if dev and not dev.is_file():
        raise FileNotFoundError(f"The dev file {settings['dev']} does not exist.")
    if settings["dev_ratio"] and not dev:
        variables["DEV_RATIO"] = settings["dev_ratio"]
    folder = roots.checked(settings["data"], "The folder of rows") if settings["data"] else None
    if not sources:
        if dev and not folder:
            raise ValueError("A dev file alone trains nothing: choose the rows that train, and press Use it.")
        if folder:
            variables["DATA"] = shown_path(folder)
        return []
    for source in sources:
        path = roots.checked(source["path"], "The file of rows")
        if not path.is_file():
            raise FileNotFoundError(f"{source['path']} does not exist; choose the file of rows again.")
        source["path"] = str(path)
        check_columns(source)
    if not folder or len(sources) > 1 or not holds(folder, Path(sources[0]["path"]), dev):
        folder = link_rows([{key: source[key] for key in source if key != "share"} for source in sources], dev, output)
    variables["DATA"] = shown_path(folder)
    words = name_columns(sources[0], variables)
    if len(sources) == 1:
        return words
    words = ["--dataset", ",".join("abcdefgh"[: len(sources)]), "--dataset_dir", shown_path(folder)]
    if any(source["share"] for source in sources):
        words += ["--mix_ratios", ",".join(source["share"] or "1" for source in sources)]
    return words


def check_columns(columns: dict) -> None:
    """ValueError for a name of a column that a script would take for a flag."""
    for kind in COLUMNS:
        if columns[kind].startswith("-"):
            raise ValueError(f"The column {columns[kind]!r} begins with -, as flags do. Rename it in the file.")


def name_columns(columns: dict, variables: dict) -> list[str]:
    """The words that name the column of dialogues; `variables` get those of the others."""
    variables |= {f"{kind.upper()}_COLUMN": columns[kind] for kind in COLUMNS[:3] if columns[kind]}
    return ["--messages_column", columns["messages"]] if columns["messages"] else []


def holds(folder, train, dev):
    """True where the scripts find these very files in a folder."""
    found = {split: file.resolve() for split, file in files_in(folder).items()} if folder.is_dir() else {}
    return found.get("train") == train and (dev is None or found.get("dev") == dev)


def check_flags(settings, variables, words):
    """Let arguments.py say what is wrong with the settings: its own words, without starting anything."""
    argv = ["--do_train", "--train_file=train.json", "--output_dir=output"]
    argv += ["--model_name_or_path", variables["MODEL"]]
    columns = {"prompt_column": "prompt", "response_column": "response"}
    argv += [f"--{flag}={variables.get(flag.upper(), name)}" for flag, name in columns.items()]
    for variable, flag in NUMBERS.values():
        value = variables.get(variable, "")
        if value and not (variable == "BATCH_SIZE" and value == "auto"):
            argv.append(f"--{flag}={value}")
    if variables["QUANTIZATION_BIT"]:
        argv.append(f"--quantization_bit={variables['QUANTIZATION_BIT']}")
    if "DEV_RATIO" in variables:
        argv.append(f"--dev_ratio={variables['DEV_RATIO']}")
    if not re.fullmatch(r"[0-9]{0,4}", settings["gpus"]) or settings["gpus"] in ("0", "00"):
        raise ValueError(f"GPUs: {settings['gpus']!r}, expected a whole number, at least 1.")
    argv += ["--finetuning_type", settings["method"]]
    argv += [] if settings["stage"] == "sft" else ["--stage", settings["stage"]]
    if RULES[settings["method"]].needs_prefix and not settings["start"] and "PRE_SEQ_LEN" not in variables:
        argv.append("--pre_seq_len=128")  # the scripts' own
    # parse_flags tells a check of the words apart from a run only by what it reads, which is nothing here.
    parse_flags([*argv, *(word for word in words if word != "--debug")])


def remembered_by(folder: Path, key: str) -> str | None:
    """A text that a checkpoint of a run in output/ remembers, None where none has it."""
    found = (read_sidecar(checkpoint).get(key) for checkpoint in sorted(Path(folder).glob("checkpoint-*")))
    return next((text for text in found if isinstance(text, str) and text), None)


def model_of(folder: Path, variables: dict) -> str:
    """MODEL for a run in output/: that of its command, else that of its checkpoints."""
    if "MODEL" in variables:
        return variables["MODEL"]
    base = remembered_by(folder, "base_model")
    return "tiny" if not base or (Path(base).name == "tiny" and (PROJECT / TINY).samefile(base)) else base


def method_of(folder: Path) -> str:
    """The way in which the newest checkpoint of a run was trained."""
    for checkpoint in sorted(Path(folder).glob("checkpoint-*")):
        if kind := finetuning_type(checkpoint):
            return kind
    return DEFAULT_METHOD


def evaluation_command(folder: Path, step, data, rows, variables: dict, roots: Roots, columns=("",) * 4) -> Command:
    """The command that answers dev rows with a checkpoint of the run in a folder, or with all.

    `data` is a file of rows, or a folder with dev.json; empty means the rows of the run, those that it has held out where
    it has. `columns` are what COLUMNS are called there; an empty one is called as in training.
    """
    step = plain_text(step, "The checkpoint", 20)
    if not re.fullmatch(r"|\d{1,9}|best|last|all", step):
        raise ValueError(f"The checkpoint is {step!r}; expected a step, best, last or all.")
    script = "evaluate.sh" if RULES[method_of(folder)].needs_prefix else "evaluate_finetune.sh"
    chosen = {"MODEL": model_of(folder, variables), "CHECKPOINT": run_name(folder.name), "STEP": step}
    chosen["QUANTIZATION_BIT"] = variables.get("QUANTIZATION_BIT", "")
    if data:
        path = roots.checked(data, "The file of rows")
        chosen["DATA"] = shown_path(link_rows([], path, folder.parent) if path.is_file() else path)
    elif words_for_held_out(folder):
        chosen["DATA"] = shown_path(roots.checked(str(folder / HELD_OUT), "The rows that were held out"))
    elif "DATA" in variables:
        chosen["DATA"] = variables["DATA"]
    if "NUM_GPUS" in variables:
        chosen["NUM_GPUS"] = variables["NUM_GPUS"]
    named = {kind: plain_text(column, "The column") for kind, column in zip(COLUMNS, columns, strict=True)}
    check_columns(named)
    words = name_columns(named, chosen)
    if rows := plain_text(rows, "The number of rows", 9):
        if not re.fullmatch(r"[1-9]\d*", rows):
            raise ValueError(f"The number of rows is {rows!r}; expected a whole number above 0.")
        words += ["--max_predict_samples", rows]
    return Command(["bash", script], chosen, words)


def export_command(folder: Path, step, bits, target: Path) -> Command:
    """The command that writes what a run has tuned to a folder of its own."""
    checkpoint = checkpoint_of(folder, step)
    words = ["--ptuning_checkpoint", shown_path(checkpoint), "--output_dir", shown_path(target)]
    if bits := plain_text(bits, "Bits", 2):
        words += ["--quantization_bit", bits]
    return Command(["python", "ptuning/export_model.py"], {}, words)


def checkpoint_of(folder: Path, step) -> Path:
    """The checkpoint folder of a run that a name means: a step, best, last, or empty for the run itself."""
    step = plain_text(step, "The checkpoint", 20)
    if not any(folder.glob("checkpoint-*")) and not finetuning_type(folder):
        raise ValueError(f"{folder.name} has no checkpoint yet. Wait until it saves, or choose another run.")
    if step in ("", "best", "last"):
        return folder / step if step else folder
    if not step.isdecimal() or not (folder / f"checkpoint-{step}").is_dir():
        raise ValueError(f"{folder.name} has no checkpoint of step {step!r}.")
    return folder / f"checkpoint-{step}"


def compare_command(folders: list[Path], place: Path) -> Command:
    """The command that compares the runs in some folders, and writes its page to another."""
    return Command(["python", "ptuning/compare.py"], {}, [*map(str, folders), "--output_dir", str(place)])
