"""The family: one row a model that this code can load, and which of them a folder holds.

Has no counterpart in the official scripts, whose folders bring their own code. A family is told by what is in config.json
and by the tokenizer's own tokens, never by the folder's name. A folder that could be two things is asked about
(--model_family), never guessed: ChatGLM3 has the configuration, the shapes and the tokenizer.model of ChatGLM2, and
`rope_ratio` means one thing in ChatGLM2 and another in ChatGLM3. It loads no torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from checkpoints.sidecar import finetuning_type, read_sidecar
from checkpoints.ways import RULES
from common.claims import MOST_JSON_BYTES, check_size
from common.files import read_json
from common.text import parse_json

ROLE_TOKEN = "<|user|>"  # ChatGLM3 has one for each role, ChatGLM2 none
# Where a folder says its tokens. The Python file is read as text and never run.
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenization_chatglm.py")
FAMILY_KEY = "model_family"  # in a config.json that this code wrote, and in a sidecar


@dataclass(frozen=True)
class Evidence:
    """What a folder says of its model: config.json, the text of each of TOKEN_FILES, and the names in these files."""

    settings: dict
    tokens: dict
    names: str

    def role_file(self):
        """The file that has a role's token, if any."""
        return next((file for file, text in self.tokens.items() if ROLE_TOKEN in text), "")

    def has_vocabulary_above(self, size):
        vocabulary = self.settings.get("padded_vocab_size")
        return isinstance(vocabulary, int) and vocabulary > size


@dataclass(frozen=True)
class Family:
    """All that differs between the models; whoever needs to know asks the row.

    `told_by` gives words for what tells the family in an Evidence, "" where nothing does. `tokenizer`, `configuration`
    and `model` are "module:class". A family with a `refusal` is known, and not loaded.
    """

    name: str  # of --model_family, and what a checkpoint remembers
    title: str  # for people
    told_by: Callable[[Evidence], str] = field(repr=False, default=lambda evidence: "")
    tokenizer: str = "chatglm2.tokenization_chatglm:ChatGLMTokenizer"
    configuration: str = "chatglm2.configuration_chatglm:ChatGLMConfig"
    model: str = "chatglm2.modeling_chatglm:ChatGLMForConditionalGeneration"
    weight_names: str = "chatglm2.weight_names"  # a module that knows the names in the files of weights
    template: str = "chatglm2"  # its prompt template where --prompt_template says nothing
    templates: tuple[str, ...] = ("chatglm2", "none")  # those that its tokens can write
    settings: dict = field(default_factory=dict, hash=False)  # what holds where its config.json lacks a field
    without: tuple[tuple[str, object, str], ...] = ()  # flag, its value, and why it cannot be had
    refusal: str = ""  # why it is not loaded, and what to use

    @property
    def names(self):
        return importlib.import_module(self.weight_names)

    @property
    def tokenizer_class(self):
        return _named(self.tokenizer)

    @property
    def configuration_class(self):
        return _named(self.configuration)

    @property
    def model_class(self):
        return _named(self.model)


def _named(place):
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _told_as_chatglm1(evidence):
    keys = [key for key in ("position_encoding_2d", "inner_hidden_size") if key in evidence.settings]
    return f"its config.json has {keys[0]}" if keys else ""


def _told_as_glm4(evidence):
    if evidence.has_vocabulary_above(100_000):
        return f"its config.json has padded_vocab_size {evidence.settings['padded_vocab_size']}"
    return "its files name glm-4" if "glm-4" in evidence.names else ""


def _told_as_codegeex2(evidence):
    keys = [key for key in ("interleaved_qkv", "rotary_percent") if key in evidence.settings]
    if keys:
        return f"its config.json has {keys[0]}"
    return "its files name codegeex2" if "codegeex2" in evidence.names else ""


def _told_as_chatglm2(evidence):
    return "its files name chatglm2" if "chatglm2" in evidence.names else ""


def _told_as_chatglm3(evidence):
    if "chatglm3" in evidence.names and "-base" not in evidence.names:
        return "its files name chatglm3"
    file = evidence.role_file()
    return f"{ROLE_TOKEN} is in its {file}" if file and not _told_as_chatglm3_base(evidence) else ""


def _told_as_chatglm3_base(evidence):
    return "its files name chatglm3 and base" if "chatglm3" in evidence.names and "-base" in evidence.names else ""


_CHATGLM3 = {
    "tokenizer": "chatglm3.tokenization_chatglm:ChatGLMTokenizer",
    "configuration": "chatglm3.configuration_chatglm:ChatGLMConfig",
    "model": "chatglm3.modeling_chatglm:ChatGLMForConditionalGeneration",
    "templates": ("chatglm3", "chatglm2", "none"),
}
# In the order in which they are tried: what tells the first two excludes all others.
FAMILIES = (
    Family(
        "chatglm1",
        "ChatGLM-6B (the first generation)",
        _told_as_chatglm1,
        tokenizer="chatglm1.tokenization_chatglm:ChatGLMTokenizer",
        configuration="chatglm1.configuration_chatglm:ChatGLMConfig",
        model="chatglm1.modeling_chatglm:ChatGLMForConditionalGeneration",
        weight_names="chatglm1.weight_names",
        template="chatglm1",
        templates=("chatglm1", "none"),
        without=(
            ("precision", "official", "the official recipe that is computed here is ChatGLM2's."),
            (
                "train_on_history",
                True,
                "it sees a whole prompt at once, so an earlier answer would be learned from itself.",
            ),
        ),
    ),
    Family(
        "glm4",
        "GLM-4",
        _told_as_glm4,
        refusal="this program trains ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B. GLM-4-9B-chat and newer have another "
        "tokenizer and are native in transformers: PEFT and LLaMA-Factory tune them",
    ),
    Family("chatglm2", "ChatGLM2", _told_as_chatglm2),
    Family("chatglm3", "ChatGLM3", _told_as_chatglm3, **_CHATGLM3, template="chatglm3"),
    Family("chatglm3-base", "ChatGLM3-Base", _told_as_chatglm3_base, **_CHATGLM3, template="none"),
    Family(
        "codegeex2", "CodeGeeX2", _told_as_codegeex2, template="none", settings={"pad_token_id": 2}
    ),  # its end token
)
BY_NAME = {family.name: family for family in FAMILIES}
EXCLUSIVE = ("chatglm1", "glm4")
ALIKE = ("chatglm2", "chatglm3")  # what a folder without any sign could be
TEMPLATES = list(dict.fromkeys(name for family in FAMILIES for name in family.templates))  # of --prompt_template
SUPPORTED = [family.name for family in FAMILIES if not family.refusal]  # the choices of --model_family


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


def read_base_settings(folder: Path, asked: str | None = None, remembered: str | None = None) -> tuple[dict, Family]:
    """(config.json of a base model's folder, its Family); `asked` and `remembered` are as in find_family.

    FileNotFoundError without config.json; ValueError where it is no base model of a supported family.
    """
    settings = read_json(folder / "config.json")
    return settings, base_family(settings, folder, asked, remembered)


def base_family(settings: dict, folder: Path, asked: str | None = None, remembered: str | None = None) -> Family:
    """The Family of read_base_settings, of a folder whose config.json has been read."""
    family = find_family(settings, folder, asked, remembered)
    trained = finetuning_type(folder)
    if trained and RULES[trained].needs_base:
        raise ValueError(
            f"{folder} holds only what --finetuning_type {trained} trained, not a base model. "
            f"Use --model_name_or_path <base model> --ptuning_checkpoint {folder}"
        )
    return family


def find_family(settings: dict, folder: Path | str, asked: str | None = None, remembered: str | None = None) -> Family:
    """The Family of a folder with this config.json.

    Where several could be meant, `asked` (--model_family) decides, else what a checkpoint has `remembered`.

    ValueError for a model of none, for one that is not supported, for an `asked` that the files exclude, and where they
    leave it open.
    """
    found = told_families(settings, folder)
    if asked is None and len(found) > 1 and remembered in [family.name for family in found]:
        asked = remembered
    if not found:
        raise ValueError(
            f"{folder} holds a model of type {settings.get('model_type')!r}; this program trains "
            f"{', '.join(BY_NAME[name].title for name in SUPPORTED)}. Give a folder of one of them as --model_name_or_path."
        )
    if asked is None and len(found) > 1:
        raise ValueError(
            f"{folder} could be {' or '.join(family.title for family in found)}"
            + "".join(f"; {reason} ({family.title})" for family, reason in found.items() if reason)
            + f". Say which it is: --model_family {' or '.join(family.name for family in found)}"
        )
    family = next(iter(found)) if asked is None else BY_NAME[asked]
    if family not in found:
        other, reason = next(iter(found.items()))
        raise ValueError(f"--model_family {asked} contradicts {folder}, which holds {other.title}: {reason}.")
    if family.refusal:
        raise ValueError(f"{folder} holds {family.title} ({found[family]}); {family.refusal} as --model_name_or_path.")
    return family


def check_same_family(checkpoint: Path | str, base: Path | str, family: Family) -> None:
    """ValueError where a checkpoint says that it was trained on a model of another Family than the one of `base`."""
    checkpoint = Path(checkpoint)
    name = read_sidecar(checkpoint).get(FAMILY_KEY)
    if name is not None and name not in BY_NAME:
        raise ValueError(f"{checkpoint}: {FAMILY_KEY} is {name!r}, expected {', '.join(SUPPORTED)}.")
    if name is None and (checkpoint / "config.json").is_file():
        found = told_families(read_json(checkpoint / "config.json"), checkpoint)
        name = next(iter(found)).name if len(found) == 1 else None
    if name not in (None, family.name):
        raise ValueError(
            f"{checkpoint} was trained on {BY_NAME[name].title}, and the base model {base} is {family.title}. Give the "
            "model that it was trained on as --model_name_or_path, or another checkpoint."
        )


def check_flags_of(family: Family, *groups) -> None:
    """ValueError where a flag in `groups` of arguments asks for what this Family is `without`."""
    for name, value, reason in family.without:
        if any(getattr(group, name, None) == value for group in groups):
            shown = "" if value is True else f" {value}"
            raise ValueError(f"--{name}{shown} cannot be used with {family.title}: {reason} Leave the flag out.")


def check_template(name: str | None, family: Family) -> str:
    """The prompt template of this name, by default the family's own. ValueError for one that its tokens cannot write."""
    if name not in (None, *family.templates):
        raise ValueError(
            f"--prompt_template {name}: the prompts of {family.title} can be {' or '.join(family.templates)}"
            + (", as its tokenizer has no tokens for roles." if name == "chatglm3" else ".")
        )
    return name or family.template


def told_families(settings: dict, folder: Path | str) -> dict[Family, str]:
    """{each Family that a folder with this config.json could be: what tells it}, {} for another kind of model."""
    if settings.get("model_type") != "chatglm":
        return {}
    evidence = read_evidence(settings, Path(folder))
    told = {family: reason for family in FAMILIES if (reason := family.told_by(evidence))}
    for name in EXCLUSIVE:
        if BY_NAME[name] in told:
            return {BY_NAME[name]: told[BY_NAME[name]]}
    if (own := settings.get(FAMILY_KEY)) is not None:
        if own not in list(BY_NAME):
            raise ValueError(f"{folder}: {FAMILY_KEY} is {own!r} in its config.json, expected {', '.join(SUPPORTED)}.")
        told.setdefault(BY_NAME[own], f"its config.json has {FAMILY_KEY} {own}")
    if not told:
        return {BY_NAME[name]: "" for name in ALIKE}
    return {family: told[family] for family in FAMILIES if family in told}


def read_evidence(settings: dict, folder: Path) -> Evidence:
    tokens = {name: text for name in TOKEN_FILES if (text := read_text(folder / name))}
    names = [settings.get("_name_or_path"), name_in(tokens.get("tokenizer_config.json", ""))]
    name = " ".join(PurePath(name).name for name in names if isinstance(name, str)).lower()
    return Evidence(settings, tokens, name)


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
