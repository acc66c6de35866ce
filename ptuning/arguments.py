"""What the command line accepts: one field, one default, one help line with its unit.

Answers to the official `arguments.py` and to transformers 4.30's `Seq2SeqTrainingArguments`. Every flag of
those is accepted: renamed ones are mapped, and the ones that have no effect (most never had any) are said
in one line.

Importing transformers' own arguments loads torch, which takes seconds. So `parse_flags` learns their names, types
and defaults from transformers' source text: --help and mistakes are answered at once. `parse_arguments` then makes
the objects that a run needs.
"""

from __future__ import annotations  # types stay text, as they are read from transformers' source

import argparse
import ast
import difflib
import functools
import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from failure import refuse
from paths import READ, seen_from_caller
from quoting import NEEDS_EQUALS, as_typed
from saving import check_saving
from text import load_json, parse_json

SUPPORTED_BITS = (4, 8)
LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # in the order of the model


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Base model: folder in the official ChatGLM2 layout, or hub id (THUDM/chatglm2-6b)."},
    )
    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "What was trained: checkpoint folder, of these or of the official scripts; or a run's folder, for its "
            "best checkpoint or else the last; or run/best, run/last, or run/all to evaluate each prefix; or several "
            "LoRA adapters with commas. --checkpoint_dir is the same."
        },
    )
    finetuning_type: Literal["p_tuning", "full", "freeze", "lora", "none"] = field(
        default=None,
        metadata={
            "help": "What trains: p_tuning: a prefix; full: all weights; freeze: some layers; lora: an adapter; none: "
            "nothing, the untouched base answers. Read from a given checkpoint [p_tuning]."
        },
    )
    pre_seq_len: int | None = field(
        default=None,
        metadata={"help": "Virtual tokens of the prefix (not the length of the text). Read from a given checkpoint."},
    )
    prefix_projection: bool | None = field(
        default=None,
        metadata={"help": "Compute the prefix by a two-layer MLP. Read from a given checkpoint, else false."},
    )
    prefix_dropout: float = field(
        default=0.1, metadata={"help": "Probability of dropping a number of the prefix while training."}
    )
    num_layer_trainable: int | None = field(
        default=None, metadata={"help": "freeze: layers that train, counted from the last; -n: the first n [3]."}
    )
    name_module_trainable: Literal["mlp", "qkv"] = field(
        default=None, metadata={"help": "freeze: what trains of these layers [mlp]."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "lora: inner width of an adapter layer [8]."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "lora: the adapter's output is multiplied by alpha / rank [32]."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "lora: probability of dropping an input of the adapter in training [0.1]."}
    )
    lora_target: str | None = field(
        default=None,
        metadata={"help": f"lora: layers that get one, with commas, of {', '.join(LORA_TARGETS)} [query_key_value]."},
    )
    resume_lora_training: bool = field(
        default=True,
        metadata={"help": "lora: train the last of the given adapters on; false: merge all and train a new one."},
    )
    quantization_bit: int | None = field(
        default=None, metadata={"help": "4 or 8: integer weights for the frozen model. Leave out for float."}
    )
    quantization_backend: Literal["auto", "triton", "cpm_kernels", "torch"] = field(
        default="auto",
        metadata={
            "help": "What computes with integer weights. auto: triton on a GPU if it works there, else torch; "
            "triton: kernels compiled for the GPU at hand; "
            "cpm_kernels: int4 only, unpacked by a kernel that cpm_kernels launches; "
            "torch: plain operations, on any device."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for models downloaded from the hub."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "Training rows: JSON lines, a JSON array, or CSV."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows for --do_eval and for the dev loss during training."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows for --do_predict."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Data sets by name, a,b, in place of --train_file; without --do_train in place of the other two."
        },
    )
    dataset_dir: str = field(
        default="data", metadata={"help": "Folder of the data sets, with the dataset_info.json that describes them."}
    )
    split: str = field(default="train", metadata={"help": "Accepted; a data file has one split, train."})
    mix_ratios: str | None = field(
        default=None,
        metadata={"help": "Share of each data set in the training rows, such as 0.7,0.3 [all rows of all data sets]."},
    )
    dev_ratio: float = field(
        default=0.0, metadata={"help": "Share of the training rows to hold out as dev rows; no --validation_file then."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts (ADGEN: content). Read from a given checkpoint."}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "Column of the responses (ADGEN: summary). Read from a given checkpoint."}
    )
    history_column: str | None = field(
        default=None, metadata={"help": "Column of earlier turns: a list of [query, response] pairs."}
    )
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of whole dialogues, lists of role (system, user, assistant) and content; used in place "
            "of the other three columns. The last answer is the response."
        },
    )
    source_prefix: str | None = field(default=None, metadata={"help": "Text put before every prompt."})
    max_source_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt, in tokens; longer ones are cut at the end, those with earlier turns at their "
            "start. Read from a given checkpoint [1024]."
        },
    )
    max_target_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest response, in tokens; longer ones are cut at the end. Read from a given checkpoint [128]."
        },
    )
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "The same for references in evaluation, in tokens [max_target_length]."}
    )
    check_data: bool = field(
        default=False,
        metadata={"help": "Read every data file that is named, print what is in it and one example, and stop there."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Use only the first n rows of every data file; the next three count before it."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first n training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first n validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first n test rows."})
    ignore_pad_token_for_loss: bool = field(
        default=True, metadata={"help": "Train on responses only; false trains on prompt and padding as well."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Encode the rows again, whatever is cached."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that encode rows; capped by rows and cores."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams when generating [1]."})
    do_sample: bool = field(
        default=True, metadata={"help": "Sample predictions as the official scripts do; false decodes greedily."}
    )
    top_p: float = field(default=0.7, metadata={"help": "Sampling: probability mass to choose from."})
    temperature: float = field(default=0.95, metadata={"help": "Sampling: above 1 flatter, towards 0 greedy."})


@dataclass
class TrainingArguments:
    """The flags of training that are not transformers' own, or have another default; see PrefixTrainingArguments."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into an output_dir that already has checkpoints."}
    )
    debug: str = field(
        default="",
        metadata={
            "help": "Without a value: show the traceback of an error. transformers' own: underflow_overflow looks "
            "for overflow in every layer."
        },
    )
    precision: Literal["auto", "official"] = field(
        default="auto",
        metadata={
            "help": "auto: bfloat16 weights where the GPU has it, else float16 with loss scaling; float32 on a CPU. "
            "official: the recipe of the official scripts number for number, to reproduce their runs."
        },
    )
    plot_loss: bool = field(default=True, metadata={"help": "Draw training_loss.png when training ends."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep less for the backward pass and compute it again: less memory, a third more time. auto: where "
            "the estimated memory exceeds what is free [auto]."
        },
    )
    eval_with_generate: bool = field(
        default=False,
        metadata={"help": "Besides every dev loss, answer the dev rows and score BLEU-4 and ROUGE. Takes its time."},
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "End the run where the dev loss, or else the training loss, keeps rising."}
    )
    # Off, or one NaN would be logged as a loss of 0.0.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN losses out of the log (hides a failed run)."}
    )


# Flag of 2023 -> the flag that does the same today.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # a value below 1 is a ratio
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "activation_checkpointing": "gradient_checkpointing",  # the other way round: newer than transformers 5.17
    "checkpoint_dir": "ptuning_checkpoint",  # ChatGLM-Efficient-Tuning's name
}
# Flags of 2023 that change nothing, and why.
UNREAD = "the official scripts never read it"
RETIRED = {
    **dict.fromkeys(
        (
            "config_name tokenizer_name use_fast_tokenizer resize_position_embeddings lang dataset_name "
            "dataset_config_name pad_to_max_length forced_bos_token"
        ).split(),
        UNREAD,
    ),
    **dict.fromkeys(
        (
            "half_precision_backend fp16_backend fp16_opt_level sharded_ddp fsdp_min_num_params past_index "
            "fsdp_transformer_layer_cls_to_wrap use_ipex jit_mode_eval torchdynamo xpu_backend tpu_num_cores "
            "tpu_metrics_debug mp_parameters ray_scope use_mps_device include_inputs_for_metrics "
            "push_to_hub_model_id push_to_hub_organization push_to_hub_token use_legacy_prediction_loop"
        ).split(),
        "transformers dropped it",
    ),
    "use_auth_token": "log in with `hf auth login`, or set HF_TOKEN",
    "save_safetensors": "a prefix is always pytorch_model.bin, an adapter always safetensors",
    "logging_dir": "",  # handled in translate_flags
    "group_by_length": "",
    "adafactor": "",
}


def check_word(word, flag):
    """ValueError for what only a broken line of the user's script can have made; `flag` is the one before, or None."""
    place = f"behind --{flag}" if flag else "before the first flag"
    if "\r" in word:
        raise ValueError(
            f"{word!r} ({place}) ends in \\r: your script has Windows line ends. Remove them: sed -i 's/\\r$//' train.sh"
        )
    if flag == "source_prefix" or re.match(r"--[\w-]+=", word):  # any text
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


def in_quotes(text):
    """A text in the quotation marks that bash needs around it."""
    return as_typed(text) if set(text) & set('"$`\\!') else f'"{text}"'


def split_flags(argv):
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
    """Whether a flag stands without a value, or with one that says on or off."""
    return is_true(values) or values[0].lower() in ("false", "0", "no", "f", "n")


def translate_flags(argv, known):
    """Flags as this version knows them, and a line of text for each that changed its meaning.

    `known` are the names of today's fields. Of a flag given twice the last counts. Raises ValueError for an
    unknown flag, with the nearest known one.
    """
    translated, notes = [], []
    flags = split_flags(argv)
    last = dict(flags)  # a script's own flag, then the user's "$@"
    for name in sorted({name for name, _ in flags if sum(other == name for other, _ in flags) > 1}):
        notes.append(f"--{name} is given more than once; the last one counts: {' '.join(last[name])}")
    for name, values in last.items():
        if name == "group_by_length" and name not in known:
            if is_true(values):
                translated += ["--train_sampling_strategy", "group_by_length"]
        elif name == "adafactor" and name not in known:
            if is_true(values):
                translated += ["--optim", "adafactor"]
        elif name == "logging_dir" and name not in known:
            os.environ["TENSORBOARD_LOGGING_DIR"] = " ".join(values)
            notes.append(f"--logging_dir: TensorBoard writes to {' '.join(values)}.")
        elif name == "debug" and is_switch(values):  # transformers has a --debug of its own, with a value
            os.environ["PTUNING_TRACEBACK"] = "1" if is_true(values) else ""
        elif name == "gradient_checkpointing" and values == ["auto"]:
            pass
        elif name in RENAMED and name not in known:
            translated += [f"--{RENAMED[name]}", *values]
        elif name in RETIRED and name not in known:
            notes.append(f"--{name} is accepted and has no effect: {RETIRED[name]}.")
        elif name == "prefix_projection" and not values:  # a switch in 2023; here it may also be left to the checkpoint
            translated += [f"--{name}", "true"]
        elif name in known and len(values) == 1 and NEEDS_EQUALS.match(values[0]):  # or it is taken for a flag
            translated.append(f"--{name}={values[0]}")
        elif name in known or name == "help":
            translated += [f"--{name}", *values]
        elif name.startswith("no_") and name[3:] in known:
            translated += [f"--{name[3:]}", "false"]
        else:
            nearest = difflib.get_close_matches(name, [*known, *RENAMED, *RETIRED], n=1)
            hint = f"Did you mean --{nearest[0]}?" if nearest else "python ptuning/main.py --help lists the flags."
            raise ValueError(f"Unknown flag --{name}. {hint}")
    return translated, notes


def flags_of_file(file):
    """The flags in a JSON file of {"name": value}, as on the command line."""
    try:
        data = Path(file).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file of arguments.") from None
    settings = load_json(data, file)
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
def library_flags():
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


def own_flags(owner):
    """{name: Flag} of a dataclass of this file."""
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


def true_or_false(word):
    if word.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {word!r}")
    return is_true([word])


def add_flag(group, flag):
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


def parse_flags(argv):
    """(ModelArguments, DataTrainingArguments, {name: value} of the given flags of training, notes), without torch.

    One word that ends in .json is read as a file of flags. Raises ValueError or FileNotFoundError for what
    cannot be meant; notes are lines to show the user.
    """
    if argv and argv[0].endswith(".json"):
        if len(argv) > 1:
            raise ValueError(f"{argv[0]} stands alone: {argv[1]} cannot be added behind it. Write it into the file.")
        argv = flags_of_file(argv[0])
    flags = {
        "model": own_flags(ModelArguments),
        "data": own_flags(DataTrainingArguments),
        "training": {**library_flags(), **own_flags(TrainingArguments)},
    }
    known = {name: flag for group in flags.values() for name, flag in group.items()}
    argv, notes = translate_flags(argv, known.keys())
    for name, values in split_flags(argv):
        if len(values) > 1 and name in known and "list" not in known[name].type:
            raise ValueError(
                f"--{name} takes one value, but has {len(values)}: {', '.join(values)}. A value with a space in it must "
                f"stand in quotes: --{name} {in_quotes(' '.join(values))}"
            )
    parser = argparse.ArgumentParser(
        prog="main.py", usage="python ptuning/main.py --flag value … (or settings.json)", allow_abbrev=False
    )
    parser.error = refuse  # instead of a page of usage
    for title, group in flags.items():
        arguments = parser.add_argument_group(title)
        for flag in group.values():
            add_flag(arguments, flag)
    given = vars(parser.parse_args(argv))
    chosen = {title: {name: given[name] for name in group if name in given} for title, group in flags.items()}
    for group in chosen.values():
        group.update({name: seen_from_caller(group[name]) for name in READ if name in group})
    model_args, data_args = ModelArguments(**chosen["model"]), DataTrainingArguments(**chosen["data"])
    if data_args.messages_column and given.keys() & {"prompt_column", "response_column", "history_column"}:
        notes.append("--messages_column holds whole dialogues; the other column flags are not read.")
    if data_args.dataset:
        replaced = ["train_file"] if given.get("do_train") else ["validation_file", "test_file"]
        notes += [f"--{name} {given[name]} is not read: --dataset counts." for name in replaced if name in given]
    if data_args.check_data:
        chosen["training"].update(what_to_check(data_args, given))
    defaults = {flag.name: flag.default for flag in flags["training"].values()}
    check(model_args, data_args, SimpleNamespace(**{**defaults, **chosen["training"]}))
    return model_args, data_args, chosen["training"], notes


def what_to_check(data_args, given):
    """The flags of training under --check_data: every split whose rows are named is read, and nothing is written."""
    trains = given.get("do_train") or not (given.get("do_eval") or given.get("do_predict"))
    flags = {
        "do_train": bool(data_args.train_file or data_args.dataset) and trains,
        "do_eval": bool(data_args.validation_file) or (bool(data_args.dataset) and given.get("do_eval", False)),
        "do_predict": bool(data_args.test_file) or (bool(data_args.dataset) and given.get("do_predict", False)),
    }
    if not any(flags.values()):
        raise ValueError(
            "--check_data has nothing to read: give --train_file, --validation_file, --test_file or --dataset."
        )
    return {"output_dir": given.get("output_dir", "output"), **flags}


def parse_arguments(argv):
    """(ModelArguments, DataTrainingArguments, PrefixTrainingArguments, notes): as `parse_flags`, and ready to run."""
    model_args, data_args, given, notes = parse_flags(argv)

    import torch
    from transformers.utils import strtobool

    from processes import join_processes
    from trainer import PrefixTrainingArguments

    settings = {"report_to": "all", "ddp_find_unused_parameters": False}  # every parameter of the prefix is always used
    if not torch.cuda.is_available():
        settings["use_cpu"] = True  # without it several processes on a CPU would each train alone
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if wanted not in ("", "-1"):
            notes.append(f"CUDA_VISIBLE_DEVICES={wanted}, but no GPU can be used here: computing on the CPU, slowly.")
    elif not given.get("use_cpu"):
        check_gpu(torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0)))
    for name in ("deepspeed", "accelerator_config"):  # transformers reads files in UTF-8 only
        if given.get(name) and not given[name].lstrip().startswith("{"):
            given[name] = read_settings_of(name, given[name])
    checkpointing = given.pop("gradient_checkpointing", None)
    checkpointing = given.pop("activation_checkpointing", checkpointing)  # its name in transformers 5
    if given.get("fsdp"):  # saved in shards, so that a run can go on with another number of processes
        settings["fsdp_config"] = {
            "state_dict_type": "SHARDED_STATE_DICT",
            **read_settings_of("fsdp_config", given.pop("fsdp_config", "")),
        }
    elif given.get("deepspeed") and torch.cuda.is_available() and not given.keys() & {"fp16", "bf16"}:
        settings["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"] = True
    cpu = settings.get("use_cpu") or given.get("use_cpu") or strtobool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    try:
        notes += join_processes(
            cpu=bool(cpu),
            backend=given.get("ddp_backend"),
            timeout=given.get("ddp_timeout", 1800),  # transformers' default
        )
        training_args = PrefixTrainingArguments(**{**settings, **given})
    except ImportError as error:  # --deepspeed, an --optim of another package, …
        raise ValueError(f"A flag needs a package that is not installed: {error}. Install it with pip.") from error
    except ValueError as error:  # transformers names the value, seldom the flag
        suspects = [f"--{name} {value}" for name, value in given.items() if str(value) and str(value) in str(error)]
        if not suspects or str(error).startswith("--"):
            raise
        raise ValueError(f"A flag of training has a wrong value: {' or '.join(suspects)} ({error}).") from error
    if training_args.fsdp and training_args.parallel_mode.value != "distributed":
        raise ValueError(
            "--fsdp needs processes to shard over: python ptuning/launch.py --nproc-per-node=8 ptuning/main.py …"
        )
    if training_args.fsdp and training_args.distributed_state.distributed_type == "MULTI_CPU":
        raise ValueError("--fsdp shards on GPUs only; on CPUs accelerate would train whole copies. Leave the flag out.")
    training_args.prediction_batch_size = given.get("per_device_eval_batch_size")
    # None: main.py decides, once it knows the model and the free memory.
    training_args.gradient_checkpointing = training_args.activation_checkpointing = checkpointing
    if training_args.eval_strategy == "no":
        training_args.eval_on_start = False
    if "do_eval" not in given:
        training_args.do_eval = False  # transformers turns it on for any eval_strategy; here it means --do_eval
    notes += use_one_device(training_args)
    training_args.remove_unused_columns = False  # the collators pick what they need
    return model_args, data_args, training_args, notes


def read_settings_of(flag, text):
    """The object that a flag spells out in JSON, or that is in the JSON file it names; {} of an empty flag."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        return load_json(text.encode(), f"--{flag}")
    try:
        settings = load_json(Path(text).read_bytes(), text)
    except FileNotFoundError:
        raise FileNotFoundError(f"--{flag} {text}: there is no such file.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--{flag} {text} must hold one object of settings, not a {type(settings).__name__}.")
    return settings


def check_gpu(num_gpus, process):
    """ValueError where there are more processes on this machine than GPUs; `process` counts from 0."""
    if process >= num_gpus:
        raise ValueError(
            f"There is no GPU for process {process + 1} of this machine: {num_gpus} can be used (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Give NUM_GPUS={num_gpus}, or --nproc-per-node."
        )


def use_one_device(training_args):
    """Keep the Trainer from splitting batches over GPUs in one process, which a prefix does not survive."""
    num_gpus = training_args.n_gpu
    if num_gpus < 2:
        return []
    training_args._n_gpu = 1
    return [
        f"Using 1 of {num_gpus} GPUs. To use all: NUM_GPUS={num_gpus} bash train.sh, or python ptuning/launch.py --nproc-per-node={num_gpus} ptuning/main.py …"
    ]


# ---- values that contradict each other


def check_quantization_bit(bits: int | None, already: int | None = None) -> int:
    """Bits of the linear weights once the model is loaded: 4, 8, or 0 for float weights.

    `bits` is what the user asks for (None: nothing), `already` is `quantization_bit` of the base model's config.json
    (None and 0: float weights). Raises ValueError for an unsupported value and for a folder that is quantized to
    another width; the same width is accepted and means that the folder is loaded as it is.
    """
    already = already or 0
    if already not in (0, *SUPPORTED_BITS):
        raise ValueError(
            f"config.json of the base model has quantization_bit {already}; int4 and int8 weights can be loaded. "
            "Use a ChatGLM2-6B, ChatGLM2-6B-int4 or ChatGLM2-6B-int8 folder."
        )
    if bits is None:
        return already
    if bits in (16, 32):
        raise ValueError(
            f"--quantization_bit {bits} makes no sense: 16 and 32 bits are the float weights themselves. "
            "Leave the flag out for a model that is not quantized, or give 4 or 8."
        )
    if bits not in SUPPORTED_BITS:
        raise ValueError(
            f"--quantization_bit {bits} is not supported. Give 4 or 8, or leave the flag out for float weights."
        )
    if already and bits != already:
        raise ValueError(
            f"--quantization_bit {bits} was given, but the base model's weights are int{already} already "
            f"(quantization_bit {already} in its config.json) and are not quantized twice. Leave the flag out to use "
            f"them as they are, or give the folder of the float model."
        )
    return bits


def at_least(least):
    return lambda value: least <= value < math.inf, f"at least {least}"


POSITIVE = (lambda value: 0 < value < math.inf, "a number above 0")
PROBABILITY = (lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_ONE = (lambda value: 0 <= value < 1, "from 0 up to, but not, 1")
# Flag -> (what its values must be, in words). NaN is never within a range.
RANGES = {
    "pre_seq_len": (lambda value: value >= 1, "at least 1 virtual token (leave it out for no prefix)"),
    "max_steps": (lambda value: value >= 1 or value == -1, "at least 1, or -1 for --num_train_epochs to count"),
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "logging_steps": POSITIVE,
    "ddp_timeout": at_least(1),
    "prefix_dropout": BELOW_ONE,
    "lora_rank": at_least(1),
    "lora_alpha": POSITIVE,
    "lora_dropout": BELOW_ONE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "label_smoothing_factor": PROBABILITY,
    "top_p": PROBABILITY,
    "temperature": (lambda value: 0 <= value <= 100, "from 0 to 100"),
    "server_port": (lambda value: 1 <= value <= 65535, "a port from 1 to 65535"),
    **dict.fromkeys(("seed", "data_seed"), (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1")),
    **dict.fromkeys(
        "warmup_steps weight_decay max_grad_norm adam_epsilon preprocessing_num_workers dataloader_num_workers".split(),
        at_least(0),
    ),
    **dict.fromkeys(
        "max_source_length max_target_length val_max_target_length max_samples max_train_samples max_eval_samples "
        "max_predict_samples num_beams generation_num_beams generation_max_length per_device_train_batch_size "
        "per_device_eval_batch_size gradient_accumulation_steps concurrency max_queue max_sessions max_length".split(),
        at_least(1),
    ),
}


def check_ranges(args):
    """Raise ValueError for a flag of `args` that is outside its range."""
    for name, (fits, expected) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not fits(value):
            raise ValueError(f"--{name} {value}: expected {expected}.")


def check_object(name, value):
    """Raise ValueError for a flag whose text should be a JSON object and is none."""
    try:
        found = parse_json(value, unique_keys=True)
    except json.JSONDecodeError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"--{name} {value} is no JSON object ({found}); expected one, such as '{{\"a\": 1}}'.")


def check(model_args, data_args, training_args):
    """Raise ValueError for values that contradict each other, before anything is read."""
    if not training_args.output_dir:
        raise ValueError("--output_dir is missing: the folder for checkpoints and results, such as output/my-run.")
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    for split, file in FILES.items():
        if getattr(training_args, f"do_{split}") and source_of(split, data_args, training_args) is None:
            raise ValueError(f"--do_{split} needs --{file}.")
    if training_args.eval_strategy != "no" and not (data_args.validation_file or data_args.dev_ratio):
        raise ValueError(f"--eval_strategy {training_args.eval_strategy} needs --validation_file or --dev_ratio.")
    check_mixture(data_args, training_args)
    if scores_answers(training_args) and not data_args.messages_column:
        check_columns(data_args.prompt_column, data_args.response_column, "--prompt_column and --response_column")
    for group in (model_args, data_args, training_args):
        check_ranges(group)
    check_quantization_bit(model_args.quantization_bit)
    check_precision(training_args)
    check_saving(training_args)
    if not 0 < data_args.top_p:
        raise ValueError(f"--top_p {data_args.top_p}: expected more than 0 and at most 1.")
    if data_args.do_sample and not 0 < data_args.temperature:
        raise ValueError(f"--temperature {data_args.temperature}: expected more than 0 (--do_sample false is greedy).")
    for name, value in vars(training_args).items():
        if isinstance(value, str) and (value.startswith("{") or name.endswith("_kwargs")):
            check_object(name, value)
    if not model_args.ptuning_checkpoint:  # else its own settings may complete these
        check_complete(model_args, data_args, training_args)


def scores_answers(training_args):
    return training_args.do_predict or training_args.do_eval or training_args.eval_with_generate


def check_columns(prompt_column, response_column, both):
    """ValueError where answers would be scored against their own prompts; `both` is how the user names the columns."""
    if prompt_column and prompt_column == response_column:
        raise ValueError(
            f"{both} are one column, {prompt_column!r}: the answers would be scored against the prompts. Name the "
            "column of the responses. With --do_predict the rows may be without it: they are answered, and not scored."
        )


def check_precision(training_args):
    """ValueError for flags that ask for two different precisions, or for a recipe that the official one is not."""
    halves = [name for name in ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval") if getattr(training_args, name)]
    if training_args.precision == "official" and training_args.auto_find_batch_size:
        raise ValueError(
            "--precision official and --auto_find_batch_size contradict each other: in the official recipe another "
            "batch size is another loss. Leave one of the two out."
        )
    if training_args.precision == "official" and halves:
        raise ValueError(
            f"--precision official and --{halves[0]} contradict each other: the official recipe is float16 weights "
            f"without loss scaling. Leave one of the two out."
        )


FILES = {"train": "train_file", "eval": "validation_file", "predict": "test_file"}


def source_of(split, data_args, training_args):
    """The flag that says where the rows of a split are: dev_ratio, dataset, or that of its file; None without one."""
    if split == "eval" and data_args.dev_ratio:
        return "dev_ratio"
    if data_args.dataset and (split == "train" or not training_args.do_train):
        return "dataset"
    return FILES[split] if getattr(data_args, FILES[split]) else None


def check_mixture(data_args, training_args):
    """Raise ValueError where the flags of data sets contradict each other."""
    ratios = split_ratios(data_args.mix_ratios)
    names = [name for name in (data_args.dataset or "").split(",") if name.strip()]
    if ratios and not names:
        raise ValueError(f"--mix_ratios {data_args.mix_ratios} mixes data sets: name them with --dataset a,b.")
    if ratios and len(ratios) != len(names):
        raise ValueError(
            f"--mix_ratios {data_args.mix_ratios} has {len(ratios)} numbers for {len(names)} data sets "
            f"(--dataset {data_args.dataset}); give one for each."
        )
    if not 0 <= data_args.dev_ratio < 1:
        raise ValueError(f"--dev_ratio {data_args.dev_ratio}: expected a share from 0 up to 1, such as 0.05.")
    if data_args.dev_ratio and data_args.validation_file:
        raise ValueError(
            f"--dev_ratio {data_args.dev_ratio} and --validation_file {data_args.validation_file} both name dev rows; "
            "leave one of them out."
        )
    if data_args.dev_ratio and not (data_args.dataset or data_args.train_file):
        raise ValueError("--dev_ratio needs --train_file or --dataset, whose rows it divides.")
    if data_args.split != "train":
        raise ValueError(
            f"--split {data_args.split}: a data file has one split, train. Describe the other rows as a data set of "
            "their own in dataset_info.json, and name it in --dataset."
        )


def split_ratios(text):
    """[0.7, 0.3] of "0.7,0.3", None of None. ValueError for anything but positive numbers."""
    if text is None:
        return None
    try:
        ratios = [float(word) for word in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio < float("inf") for ratio in ratios):
        raise ValueError(f"--mix_ratios {text}: expected a positive number for each data set, such as 0.7,0.3.")
    return ratios


# Which way of tuning reads a flag.
METHOD_FLAGS = {
    "pre_seq_len": "p_tuning",
    "prefix_projection": "p_tuning",
    "num_layer_trainable": "freeze",
    "name_module_trainable": "freeze",
    "lora_rank": "lora",
    "lora_alpha": "lora",
    "lora_dropout": "lora",
    "lora_target": "lora",
}


def check_method(model_args, training_args):
    """Raise ValueError for flags that do not go with the way of tuning."""
    method = model_args.finetuning_type or "p_tuning"
    for name, owner in METHOD_FLAGS.items():
        value = getattr(model_args, name)
        if value not in (None, False) and method not in (owner, "none"):
            raise ValueError(
                f"--{name} {value} belongs to --finetuning_type {owner}, but this run's is {method}. "
                f"Leave the flag out, or give --finetuning_type {owner}."
            )
    if method == "none" and training_args.do_train:
        raise ValueError("--finetuning_type none trains nothing: it is for --do_predict and --do_eval of the base.")
    if training_args.precision == "official" and method not in ("p_tuning", "none"):
        raise ValueError(
            f"--precision official is how the official scripts train a prefix; --finetuning_type {method} trains in "
            "float32. Leave it out."
        )
    check_bits_train(method, model_args.quantization_bit, training_args.do_train)
    if model_args.num_layer_trainable == 0:
        raise ValueError("--num_layer_trainable 0 trains nothing. Give n for the last n layers, -n for the first n.")
    unknown = set((model_args.lora_target or LORA_TARGETS[0]).split(",")) - set(LORA_TARGETS)
    if unknown:
        raise ValueError(f"--lora_target {model_args.lora_target}: expected some of {','.join(LORA_TARGETS)}.")
    check_engines(method, training_args)


def check_bits_train(method, bits, do_train):
    """Raise ValueError for integer weights (`bits` 4 or 8) where a method trains, or has trained, such weights."""
    if bits and method == "full" and do_train:
        raise ValueError(
            f"--finetuning_type full trains the weights themselves, and int{bits} weights cannot be trained. Leave "
            "--quantization_bit out and give a float base model; to tune integer weights give --finetuning_type lora."
        )
    if bits and method == "freeze":
        raise ValueError(
            f"--finetuning_type freeze trains some of the weights themselves, and they are int{bits} here. Leave "
            "--quantization_bit out and give a float base model; to tune integer weights give --finetuning_type lora."
        )


def check_engines(method, training_args):
    """Raise ValueError where --deepspeed or --fsdp cannot be of use."""
    engines = [name for name in ("deepspeed", "fsdp") if getattr(training_args, name, None)]
    if not engines:
        return
    if len(engines) == 2:
        raise ValueError("--deepspeed and --fsdp both shard the model over the processes; give one of them.")
    if method != "full":
        raise ValueError(
            f"--{engines[0]} shards what --finetuning_type full trains; {method} trains so little that launch.py alone "
            f"(one copy of the model for each GPU) serves it. Leave --{engines[0]} out."
        )
    if not training_args.do_train or training_args.do_predict or training_args.do_eval:
        raise ValueError(
            f"--{engines[0]} is for training only, and cannot generate. Evaluate the checkpoint in a run of its own "
            f"without it: bash evaluate_finetune.sh."
        )


EXAMPLES = {"model_name_or_path": "THUDM/chatglm2-6b", "prompt_column": "content", "response_column": "summary"}


def check_complete(model_args, data_args, training_args):
    """Raise ValueError where flags and checkpoint together leave out what a run needs, or contradict each other."""
    check_method(model_args, training_args)
    is_prefix = model_args.finetuning_type in (None, "p_tuning")
    if training_args.do_train and is_prefix and not model_args.pre_seq_len and not data_args.check_data:
        raise ValueError("--do_train needs --pre_seq_len, the number of virtual tokens (official: 128).")
    if model_args.pre_seq_len and not (training_args.do_train or model_args.ptuning_checkpoint):
        raise ValueError(
            f"--pre_seq_len {model_args.pre_seq_len} without --ptuning_checkpoint would answer with a random prefix. "
            "Give the checkpoint to evaluate, or leave the flag out to evaluate the base model."
        )
    sources = {source_of(split, data_args, training_args) for split in FILES if getattr(training_args, f"do_{split}")}
    if training_args.eval_strategy != "no":
        sources.add(source_of("eval", data_args, training_args))
    needs_columns = not data_args.messages_column and not (data_args.dataset and sources <= {"dataset", "dev_ratio"})
    answers_only = not (training_args.do_train or training_args.do_eval)
    for name, example in EXAMPLES.items():
        if name != "model_name_or_path" and not needs_columns:
            continue
        if name == "response_column" and answers_only:  # of rows that are answered, and not scored
            continue
        if not getattr(model_args if name == "model_name_or_path" else data_args, name):
            raise ValueError(f"--{name} is missing (for ADGEN: {example}).")


# ---- the demos


def add_model_arguments(parser):
    """The flags that all three programs share, with the official names."""
    parser.add_argument("--model_name_or_path", help="Base model: folder or hub id. Read from the checkpoint.")
    parser.add_argument(
        "--ptuning_checkpoint",
        "--checkpoint_dir",
        help="What was trained: a checkpoint folder, or a run (its best one, or else the last); several LoRA adapters "
        "with commas.",
    )
    parser.add_argument("--quantization_bit", type=int, help="4 or 8. Read from the checkpoint, else float weights.")
    parser.add_argument("--pre_seq_len", type=int, help="Not needed: read from the checkpoint, only compared with it.")
    parser.add_argument("--concurrency", type=int, default=8, help="Answers computed at once [8].")
    parser.add_argument("--max_queue", type=int, default=64, help="Requests that may wait for a place [64].")
    parser.add_argument("--max_sessions", type=int, default=32, help="Conversations that keep their cache [32].")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")


def parse_words(parser, argv):
    """What `parser` makes of the words; ValueError for what it cannot take, with the nearest flag it knows."""
    parser.error = refuse
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"python ptuning/{parser.prog} --help lists the flags."
        raise ValueError(f"Unknown {'flag' if unknown[0].startswith('-') else 'word'} {unknown[0]}. {hint}")
    check_ranges(args)
    if "quantization_bit" in args:
        check_quantization_bit(args.quantization_bit)
    return args
