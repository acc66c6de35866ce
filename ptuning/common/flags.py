"""The words of a command line: split, parsed, held against their ranges.

Importing transformers' own arguments loads torch, which takes seconds. So `library_flags` learns their names, types and
defaults from transformers' source text: --help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from common.quoting import as_typed
from common.text import load_json, load_yaml, parse_json
from common.values import is_text

YAML_ENDS = (".yaml", ".yml")


def check_word(word, flag):
    """ValueError for what only a broken line of the user's script can have made; `flag` is the one before, or None."""
    place = f"behind --{flag}" if flag else "before the first flag"
    if "\r" in word:
        raise ValueError(
            f"{word!r} ({place}) ends in \\r: your script has Windows line ends. Remove them: sed -i 's/\\r$//' train.sh"
        )
    if flag in ("source_prefix", "query_separator") or re.match(r"--[\w-]+=", word):  # any text
        return
    if word.startswith(("#", " #")) or (word and not word.strip()):
        kind = "comment" if "#" in word else "space"
        raise ValueError(
            f"A {kind} stands {place}, where the \\ must be the last of its line: what follows it is lost. Remove the "
            f"{kind}, or put it on a line of its own above the command."
        )
    if word.startswith(("–", "—", "−", "－")):
        raise ValueError(f"{word!r} ({place}) begins with a dash of prose. Write --{word.lstrip('–—−－')}")
    if (unquoted := word.strip("“”‘’＂")) != word:
        raise ValueError(
            f"{word!r} ({place}): the quotation marks of prose are part of it. Write {in_quotes(unquoted)}"
        )
    if re.fullmatch("-[a-z_]{2,}", word):
        raise ValueError(f"{word!r} ({place}): a flag begins with two dashes. Write -{word}")


def in_quotes(text: str) -> str:
    """A text in the quotation marks that bash needs around it."""
    return as_typed(text) if set(text) & set('"$`\\!') else f'"{text}"'


def split_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """[--a 1 2 --b] -> [("a", ["1", "2"]), ("b", [])]; `-` in names reads as `_`. ValueError for stray words."""
    flags = []
    for word in argv:
        check_word(word, flags[-1][0] if flags else None)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise ValueError(f"Stray word {word!r} before the first flag. Was a \\ at the end of a line lost?")
    return flags


def is_true(values):
    return not values or values[0].lower() in ("true", "1", "yes", "t", "y")


def is_switch(values):
    """True for the values of a flag that stands without one, or with one that says on or off."""
    return is_true(values) or values[0].lower() in ("false", "0", "no", "f", "n")


def flags_of_file(file: str) -> list[str]:
    """The flags in a JSON or, by its name, YAML file of {"name": value}, as on the command line."""
    try:
        data = Path(file).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file of arguments.") from None
    settings = (load_yaml if file.endswith(YAML_ENDS) else load_json)(data, file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold one object of flags and values, not a {type(settings).__name__}.")
    argv = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv


# ---- the parser


@dataclass
class Flag:
    """A flag as its source text declares it: `type` is text such as "int | None", `default` None if it is no literal."""

    name: str
    type: str
    default: object
    help: str
    choices: list | None = None


def literal(node):
    """The value that an expression of the source spells out, None where it is none."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


@functools.cache
def library_flags() -> dict[str, Flag]:
    """{name: Flag} of transformers' Seq2SeqTrainingArguments, read from its source. FileNotFoundError without it."""
    package = importlib.util.find_spec("transformers")
    if package is None:
        raise FileNotFoundError("transformers is not installed here. Run: pip install -r requirements.txt")
    classes = {}
    for name in ("trainer_utils.py", "training_args.py", "training_args_seq2seq.py"):
        source = Path(package.origin).with_name(name).read_text(encoding="utf-8")
        classes.update((node.name, node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    flags = {}
    for owner in ("TrainingArguments", "Seq2SeqTrainingArguments"):
        for node in classes[owner].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            field_of = {keyword.arg: keyword.value for keyword in getattr(node.value, "keywords", [])}
            metadata = field_of.get("metadata", ast.Dict([], []))
            metadata = {literal(key): literal(value) for key, value in zip(metadata.keys, metadata.values, strict=True)}
            kind = ast.unparse(node.annotation)
            choices = metadata.get("choices")
            if kind.split()[0] in classes:  # an enumeration, such as IntervalStrategy | str
                choices = [literal(entry.value) for entry in classes[kind.split()[0]].body if hasattr(entry, "targets")]
            flags[node.target.id] = Flag(
                node.target.id, kind, literal(field_of.get("default")), metadata.get("help") or "", choices
            )
    return flags


def declare(help: str, default=None):
    """A field of a dataclass of flags: its line in --help, and its default."""
    return field(default=default, metadata={"help": help})


def own_flags(owner: type) -> dict[str, Flag]:
    """{name: Flag} of a dataclass of flags, such as those of arguments.py."""
    return {
        entry.name: Flag(
            entry.name,
            entry.type,
            entry.default,
            entry.metadata["help"],
            list(ast.literal_eval(entry.type.removeprefix("Literal"))) if entry.type.startswith("Literal") else None,
        )
        for entry in fields(owner)
    }


def true_or_false(word: str) -> bool:
    """What the value of a switch says; argparse's error for another word."""
    if not is_switch([word]):
        raise argparse.ArgumentTypeError(f"expected true or false, not {word!r}")
    return is_true([word])


def add_flag(group, flag: Flag) -> None:
    """One flag of argparse; without a default, so that what was given can be told from what was not."""
    names = set(flag.type.replace("[", " ").replace("]", " ").split())
    settings = {"type": next((kind for kind in (int, float) if kind.__name__ in names), str), "choices": flag.choices}
    if "bool" in names and "str" not in names:
        settings = {"type": true_or_false, "nargs": "?", "const": True, "metavar": "true|false"}
    elif "list" in names:
        settings["nargs"] = "+"
    if not flag.choices and "metavar" not in settings:
        settings["metavar"] = {int: "N", float: "X", str: "TEXT"}[settings["type"]]
    default = "" if flag.default in (None, "") else f" [{flag.default}]".replace("%", "%%")
    group.add_argument(f"--{flag.name}", default=argparse.SUPPRESS, help=flag.help + default, **settings)


def at_least(least):
    return lambda value: least <= value < math.inf, f"at least {least}"


PROBABILITY = (lambda value: 0 <= value <= 1, "from 0 to 1")
LARGEST_FLAG = 2**32 - 1  # a whole number; libraries give up in words of their own at 2**63, after minutes of work
# Flags that a tokenizer or a data file is asked with; a path may have any bytes.
TEXTS = "source_prefix query_separator prompt_column response_column history_column messages_column".split()
# Flag -> (what its values must be, in words). NaN is never within a range.
RANGES = {
    "pre_seq_len": (lambda value: value >= 1, "at least 1 virtual token (leave it out for no prefix)"),
    "max_steps": (lambda value: value >= 1 or value == -1, "at least 1, or -1 for --num_train_epochs to count"),
    "label_smoothing_factor": PROBABILITY,
    "dpo_label_smoothing": (lambda value: 0 <= value < 0.5, "from 0 up to, but not, 0.5"),
    "top_p": PROBABILITY,
    "temperature": (lambda value: 0 <= value <= 100, "from 0 to 100"),
    "server_port": (lambda value: 1 <= value <= 65535, "a port from 1 to 65535"),
    **dict.fromkeys(
        "learning_rate num_train_epochs save_steps eval_steps logging_steps lora_alpha dpo_beta".split(),
        (lambda value: 0 < value < math.inf, "a number above 0"),
    ),
    **dict.fromkeys(
        "prefix_dropout lora_dropout adam_beta1 adam_beta2".split(),
        (lambda value: 0 <= value < 1, "from 0 up to, but not, 1"),
    ),
    "keep_base_rows": (lambda value: 0 < value <= 8, "a number above 0, at most 8"),
    **dict.fromkeys(("seed", "data_seed"), (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1")),
    **dict.fromkeys(
        "keep_base warmup_steps weight_decay max_grad_norm adam_epsilon preprocessing_num_workers dataloader_num_workers".split(),
        at_least(0),
    ),
    **dict.fromkeys(
        "max_source_length max_target_length val_max_target_length max_samples max_train_samples max_eval_samples "
        "max_predict_samples num_beams generation_num_beams generation_max_length per_device_train_batch_size "
        "per_device_eval_batch_size gradient_accumulation_steps concurrency max_queue max_sessions max_length "
        "ddp_timeout lora_rank ppo_epochs".split(),
        at_least(1),
    ),
}


def check_ranges(args) -> None:
    """Raise ValueError for a flag of `args` that is outside its range, or that no program could count up to."""
    for name, (fits, expected) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not fits(value):
            raise ValueError(f"--{name} {value}: expected {expected}.")
    for name, value in vars(args).items():
        if isinstance(value, int) and value > LARGEST_FLAG:
            raise ValueError(f"--{name} {value}: expected at most {LARGEST_FLAG}.")
        if name in TEXTS and isinstance(value, str) and not is_text(value):
            raise ValueError(f"--{name} is not text in UTF-8. Set the terminal, or the script it is in, to UTF-8.")


def check_object(name: str, value: str) -> None:
    """Raise ValueError for a flag whose text should be a JSON object and is none."""
    try:
        found = parse_json(value, unique_keys=True)
    except json.JSONDecodeError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"--{name} {value} is no JSON object ({found}); expected one, such as '{{\"a\": 1}}'.")
