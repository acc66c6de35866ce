"""ptuning.json beside a checkpoint's weights: what config.json lacks, such as base model, columns and lengths.

Answers to nothing in the official scripts, whose users repeat these as flags. A checkpoint without it loads, too.
"""

from pathlib import Path

from checkpoints.file_names import FINETUNING_FILE
from checkpoints.ways import DEFAULT_METHOD, RULES, TRAINED
from common.files import read_json
from common.messages import short_json
from common.values import is_count, is_number, is_text

SIDECAR_FILE = "ptuning.json"
TELLING_FILES = (SIDECAR_FILE, FINETUNING_FILE)  # of the way in which a checkpoint was trained
SIDECAR_KINDS = {
    **dict.fromkeys("base_model prompt_column response_column history_column messages_column".split(), str),
    **dict.fromkeys(
        ("source_prefix", "query_separator", "base_fingerprint", "engine", "stage", "model_family", "prompt_template"),
        str,
    ),
    **dict.fromkeys(("max_source_length", "max_target_length"), int),
    "train_on_history": bool,
    **dict.fromkeys(("drift", "same_answers"), float),
    "training": dict,
    "merged_checkpoints": list,
}
KIND_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a positive integer",
    float: "a number",
    dict: "an object",
    list: "a list of folders",
}


def read_sidecar(checkpoint: Path | str) -> dict:
    """The settings in the sidecar of a checkpoint, {} where there is none. ValueError where one has the wrong type."""
    file = Path(checkpoint) / SIDECAR_FILE
    settings = read_json(file) if file.is_file() else {}
    check_sidecar(settings, file)
    return settings


def finetuning_type(checkpoint: Path | str) -> str | None:
    """The way in which the contents of a checkpoint folder were trained; None for other folders."""
    checkpoint = Path(checkpoint)
    if file := next((checkpoint / name for name in TELLING_FILES if (checkpoint / name).is_file()), None):
        kind = read_json(file).get("finetuning_type", DEFAULT_METHOD)
        if kind not in TRAINED:
            expected = f"{', '.join(TRAINED[:-1])} or {TRAINED[-1]}"
            raise ValueError(f"{file}: finetuning_type is {kind!r}, expected {expected}.")
        return kind
    return next((name for name in TRAINED if any((checkpoint / file).is_file() for file in RULES[name].files)), None)


def check_sidecar(settings: dict, file: Path | str) -> None:
    """Raise ValueError where what the sidecar `file` says has the wrong type."""
    for name, kind in SIDECAR_KINDS.items():
        value = settings.get(name)
        fits = is_count(value, 1) if kind is int else isinstance(value, kind)
        if kind is float:
            fits = is_number(value)
        if kind is list and fits:
            fits = all(isinstance(item, str) for item in value)
        if kind is str and fits:
            fits = is_text(value)
        if value is not None and not fits:
            raise ValueError(
                f"{file}: {name} is {short_json(value)}, expected {KIND_NAMES[kind]}. Repair or delete that file."
            )
