"""Which model a folder holds, told by what is in its files and never by the folder's name.

Has no counterpart in the official scripts, whose folders bring their own code. ChatGLM3 has the configuration, the
shapes and the tokenizer.model of ChatGLM2; what differs are its weights, its prompt and the tokens of its roles. A folder
of its first revision, without any name and without its Python files, cannot be told from ChatGLM2's.
"""

import json
from pathlib import Path, PurePath

from checkpoints.sidecar import finetuning_type
from checkpoints.ways import RULES
from common.claims import MOST_JSON_BYTES, check_size
from common.files import read_json
from common.text import parse_json

ROLE_TOKEN = "<|user|>"  # ChatGLM3 has one for each role, ChatGLM2 none
# Where a folder says its tokens. The Python file is read as text and never run.
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenization_chatglm.py")


def local_folder(name_or_path: str) -> Path | None:
    """The folder that --model_name_or_path names, None for a hub id. FileNotFoundError for what is neither."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"--model_name_or_path {name_or_path} is a file; give the folder that holds it.")
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(
            f"--model_name_or_path {name_or_path}: there is no such folder. Give a folder with config.json, "
            "tokenizer.model and the weights, or a hub id such as THUDM/chatglm2-6b."
        )
    return None


def read_base_settings(folder: Path) -> dict:
    """config.json of a base model's folder. FileNotFoundError without it, ValueError where it is no ChatGLM2."""
    settings = read_json(folder / "config.json")
    family = model_family(settings, folder)
    if family != "chatglm2":
        raise ValueError(
            f"{folder} holds {family}; this program trains ChatGLM2 (ChatGLM2-6B and models of its architecture). "
            "Give a ChatGLM2 folder as --model_name_or_path."
        )
    trained = finetuning_type(folder)
    if trained and RULES[trained].needs_base:
        raise ValueError(
            f"{folder} holds only what --finetuning_type {trained} trained, not a base model. "
            f"Use --model_name_or_path <base model> --ptuning_checkpoint {folder}"
        )
    return settings


def model_family(settings: dict, folder: Path | str) -> str:
    """The model that a config.json describes: "chatglm2", or in words one that this code cannot load."""
    tokens = {name: text for name in TOKEN_FILES if (text := read_text(Path(folder) / name))}
    names = [settings.get("_name_or_path"), name_in(tokens.get("tokenizer_config.json", ""))]
    name = " ".join(PurePath(name).name for name in names if isinstance(name, str)).lower()
    vocabulary = settings.get("padded_vocab_size")
    if settings.get("model_type") != "chatglm":
        return f"a model of type {settings.get('model_type')!r}"
    if "position_encoding_2d" in settings or "inner_hidden_size" in settings:
        return "ChatGLM-6B (the first generation)"
    if "glm-4" in name or (isinstance(vocabulary, int) and vocabulary > 100_000):
        return "GLM-4"
    if place := next((file for file, text in tokens.items() if ROLE_TOKEN in text), None):
        return f"ChatGLM3, whose {ROLE_TOKEN} is in its {place}"
    if "chatglm3" in name:
        return "ChatGLM3"
    return "chatglm2"


def read_text(file):
    """Text of a small file, JSON without its escapes; "" where there is none."""
    if not file.is_file():
        return ""
    check_size(file, MOST_JSON_BYTES)
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return json.dumps(parse_json(text), ensure_ascii=False) if file.suffix == ".json" else text
    except (json.JSONDecodeError, RecursionError):  # said where the file is needed
        return text


def name_in(text):
    """The name that a tokenizer_config.json gives its tokenizer, if any."""
    try:
        return json.loads(text)["name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
