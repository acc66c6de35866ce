"""What the command line accepts: one field, one default, one help line with its unit.

Answers to the official `arguments.py` and to transformers 4.30's `Seq2SeqTrainingArguments`. Every flag of
those is accepted: renamed ones are mapped, and the ones that have no effect (most never had any) are said
in one line.
"""

import difflib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from failure import refuse
from quantization import check_quantization_bit


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Base model: folder in the official ChatGLM2 layout, or hub id (THUDM/chatglm2-6b)."},
    )
    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Trained prefix: checkpoint folder, of these or of the official scripts."},
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
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts (ADGEN: content). Read from a given checkpoint."}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "Column of the responses (ADGEN: summary). Read from a given checkpoint."}
    )
    history_column: str | None = field(
        default=None, metadata={"help": "Column of earlier turns: a list of [query, response] pairs."}
    )
    source_prefix: str | None = field(default=None, metadata={"help": "Text put before every prompt."})
    max_source_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt, in tokens; longer ones are cut at the end. Read from a given checkpoint [1024]."
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
class TrainingArguments(Seq2SeqTrainingArguments):
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
    "save_safetensors": "the prefix is always written as pytorch_model.bin",
    "logging_dir": "",  # handled in translate_flags
    "group_by_length": "",
    "adafactor": "",
}


def split_flags(argv):
    """[--a 1 2 --b] -> [("a", ["1", "2"]), ("b", [])]; `-` in names reads as `_`. ValueError for stray words."""
    flags = []
    for word in argv:
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
        elif name in RENAMED and name not in known:
            translated += [f"--{RENAMED[name]}", *values]
        elif name in RETIRED and name not in known:
            notes.append(f"--{name} is accepted and has no effect: {RETIRED[name]}.")
        elif name == "prefix_projection" and not values:  # a switch in 2023; here it may also be left to the checkpoint
            translated += [f"--{name}", "true"]
        elif name in known or name == "help" or name.startswith("no_") and name[3:] in known:
            translated += [f"--{name}", *values]
        else:
            nearest = difflib.get_close_matches(name, [*known, *RENAMED, *RETIRED], n=1)
            hint = f"Did you mean --{nearest[0]}?" if nearest else "python ptuning/main.py --help lists the flags."
            raise ValueError(f"Unknown flag --{name}. {hint}")
    return translated, notes


def flags_of_file(file):
    """The flags in a JSON file of {"name": value}, as on the command line."""
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file of arguments.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold one object of flags and values, not a {type(settings).__name__}.")
    argv = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv


def parse_arguments(argv):
    """(ModelArguments, DataTrainingArguments, TrainingArguments, notes) from the words after `main.py`.

    One word that ends in .json is read as a file of flags. Raises ValueError or FileNotFoundError for what
    cannot be meant; notes are lines to show the user.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = flags_of_file(argv[0])
    classes = (ModelArguments, DataTrainingArguments, TrainingArguments)
    known = {name.name for cls in classes for name in fields(cls) if name.init}
    argv, notes = translate_flags(argv, known)
    given = {name for name, _ in split_flags(argv)}
    if "report_to" not in given:
        argv += ["--report_to", "all"]
    if "output_dir" not in given and "help" not in given:
        raise ValueError("--output_dir is missing: the folder for checkpoints and results, such as output/my-run.")
    if not torch.cuda.is_available():
        if "use_cpu" not in given:
            argv += ["--use_cpu", "true"]  # without it several processes on a CPU would each train alone
    elif not given & {"gradient_checkpointing", "activation_checkpointing"}:
        argv += ["--gradient_checkpointing", "true"]  # as the official scripts; memory is scarce on GPUs
    if "ddp_find_unused_parameters" not in given:
        argv += ["--ddp_find_unused_parameters", "false"]  # every parameter of the prefix is always used
    parser = HfArgumentParser(classes, prog="main.py", allow_abbrev=False)
    parser.error = refuse  # instead of a page of usage
    try:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    except ImportError as error:  # --deepspeed, an --optim of another package, …
        raise ValueError(f"A flag needs a package that is not installed: {error}. Install it with pip.") from error
    if training_args.eval_strategy == "no":
        training_args.eval_on_start = False
    if "do_eval" not in given:
        training_args.do_eval = False  # transformers turns it on for any eval_strategy; here it means --do_eval
    check(model_args, data_args, training_args)
    notes += use_one_device(training_args)
    training_args.remove_unused_columns = False  # the collators pick what they need
    return model_args, data_args, training_args, notes


def use_one_device(training_args):
    """Keep the Trainer from splitting batches over GPUs in one process, which a prefix does not survive."""
    num_gpus = training_args.n_gpu
    if num_gpus < 2:
        return []
    training_args._n_gpu = 1
    return [f"Using 1 of {num_gpus} GPUs. To use all: torchrun --nproc-per-node={num_gpus} ptuning/main.py …"]


def check(model_args, data_args, training_args):
    """Raise ValueError for values that contradict each other, before anything is read."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    for action, file in (("train", "train"), ("eval", "validation"), ("predict", "test")):
        if getattr(training_args, f"do_{action}") and not getattr(data_args, f"{file}_file"):
            raise ValueError(f"--do_{action} needs --{file}_file.")
    if training_args.eval_strategy != "no" and not data_args.validation_file:
        raise ValueError(f"--eval_strategy {training_args.eval_strategy.value} needs --validation_file.")
    if model_args.pre_seq_len is not None and model_args.pre_seq_len < 1:
        raise ValueError(
            f"--pre_seq_len {model_args.pre_seq_len}: expected at least 1 virtual token (leave it out for no prefix)."
        )
    check_quantization_bit(model_args.quantization_bit)
    if not 0 <= model_args.prefix_dropout < 1:
        raise ValueError(f"--prefix_dropout {model_args.prefix_dropout}: expected a probability from 0 up to 1.")
    for name in ("max_source_length", "max_target_length", "val_max_target_length"):
        value = getattr(data_args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1 token.")
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "num_beams"):
        value = getattr(data_args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1.")
    if not 0 < data_args.top_p <= 1:
        raise ValueError(f"--top_p {data_args.top_p}: expected more than 0 and at most 1.")
    if data_args.do_sample and data_args.temperature <= 0:
        raise ValueError(f"--temperature {data_args.temperature}: expected more than 0 (--do_sample false is greedy).")
