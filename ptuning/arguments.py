"""What the command line accepts: one field, one default, one help line with its unit.

Answers to the official `arguments.py` and to transformers 4.30's `Seq2SeqTrainingArguments`. Every flag of
those is accepted: renamed ones are mapped, and the ones that have no effect (most never had any) are said
in one line.

Importing transformers' own arguments loads torch, which takes seconds. So `parse_flags` learns their names, types
and defaults from transformers' source text: --help and mistakes are answered at once. `parse_arguments` then makes
the objects that a run needs.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from chatglm2.bits import check_quantization_bit
from checkpoints.ways import EFFICIENT_TUNING, RULES, SWAPPED, default_method
from common.failure import refuse
from common.flags import (
    YAML_ENDS,
    add_flag,
    check_object,
    check_ranges,
    declare,
    flags_of_file,
    library_flags,
    own_flags,
    split_flags,
    true_or_false,
)
from common.flags_of_2023 import RENAMED, RETIRED, translate_flags
from common.paths import READ, seen_from_caller
from common.quoting import as_typed
from data.sources import FILES, check_columns, check_mixture, scores_answers, source_of
from families import SUPPORTED, TEMPLATES
from training.flags import TrainingArguments
from training.saving import check_saving
from training.stages import SAMPLING, check_own_flags, check_stage
from tuning.rules import LORA_TARGETS, check_device_map, check_method


@dataclass
class ModelArguments:
    model_name_or_path: str | None = declare(
        "Base model: folder in the official ChatGLM2 layout, or hub id (THUDM/chatglm2-6b)."
    )
    model_family: Literal["chatglm2", "chatglm3", "chatglm3-base", "codegeex2"] = declare(
        "Which model the base is, where its files leave it open. Read from a given checkpoint."
    )
    ptuning_checkpoint: str | None = declare(
        "What was trained: checkpoint folder, of these or of the official scripts; or a run's folder, for its best "
        "checkpoint or else the last; or run/best, run/last, or run/all to evaluate each prefix; or several LoRA "
        "adapters with commas. --checkpoint_dir is the same."
    )
    stage = None  # no flag of the model, but where --stage was given other defaults hold
    finetuning_type: Literal["p_tuning", "full", "freeze", "lora", "none"] = declare(
        "What trains: p_tuning: a prefix; full: all weights; freeze: some layers; lora: an adapter; none: nothing, the "
        "untouched base answers. Read from a given checkpoint [p_tuning]."
    )
    pre_seq_len: int | None = declare(
        "Virtual tokens of the prefix (not the length of the text). Read from a given checkpoint."
    )
    prefix_projection: bool | None = declare(
        "Compute the prefix by a two-layer MLP. Read from a given checkpoint, else false."
    )
    prefix_dropout: float = declare("Probability of dropping a number of the prefix while training.", default=0.1)
    num_layer_trainable: int | None = declare("freeze: layers that train, counted from the last; -n: the first n [3].")
    name_module_trainable: Literal["mlp", "qkv"] = declare("freeze: what trains of these layers [mlp].")
    lora_rank: int | None = declare("lora: inner width of an adapter layer [8].")
    lora_alpha: float | None = declare("lora: the adapter's output is multiplied by alpha / rank [32].")
    lora_dropout: float | None = declare("lora: probability of dropping an input of the adapter in training [0.1].")
    lora_target: str | None = declare(
        f"lora: layers that get one, with commas, of {', '.join(LORA_TARGETS)} [query_key_value]."
    )
    resume_lora_training: bool = declare(
        "lora: train the last of the given adapters on; false: merge all and train a new one.", default=True
    )
    quantization_bit: int | None = declare("4 or 8: integer weights for the frozen model. Leave out for float.")
    quantization_backend: Literal["auto", "triton", "cpm_kernels", "packed", "torch"] = declare(
        "What computes with integer weights. auto: triton on a GPU if it works there, packed on a CPU if "
        "it is faster there, else torch; triton: kernels compiled for the GPU at hand; packed: torch's own for answers "
        "on a CPU, activations in bfloat16; cpm_kernels: int4 only, unpacked by a kernel that cpm_kernels launches; "
        "torch: plain operations, on any device.",
        default="auto",
    )
    quantize_output_layer: bool = declare(
        "For answers: the output layer in int8, which is the largest weight.", default=False
    )
    device_map: Literal["auto"] = declare(
        "For answers: auto spreads the model over all GPUs, and over the CPU where they are too small [one device]."
    )
    cache_dir: str | None = declare("Folder for models downloaded from the hub.")
    model_revision: str | None = declare("Branch, tag or commit on the hub.")


@dataclass
class DataTrainingArguments:
    train_file: str | None = declare("Training rows: JSON lines, a JSON array, or CSV.")
    validation_file: str | None = declare("Rows for --do_eval and for the dev loss during training.")
    test_file: str | None = declare("Rows for --do_predict.")
    dataset: str | None = declare(
        "Data sets by name, a,b, in place of --train_file; without --do_train in place of the other two."
    )
    dataset_dir: str = declare(
        "Folder of the data sets, with the dataset_info.json that describes them.", default="data"
    )
    split: str = declare("Split of the data sets of a hub; a data file has one split, train.", default="train")
    mix_ratios: str | None = declare(
        "Share of each data set in the training rows, such as 0.7,0.3 [all rows of all data sets]."
    )
    dev_ratio: float = declare(
        "Share of the training rows to hold out as dev rows; no --validation_file then.", default=0.0
    )
    prompt_column: str | None = declare("Column of the prompts (ADGEN: content). Read from a given checkpoint.")
    response_column: str | None = declare("Column of the responses (ADGEN: summary). Read from a given checkpoint.")
    history_column: str | None = declare("Column of earlier turns: a list of [query, response] pairs.")
    messages_column: str | None = declare(
        "Column of whole dialogues, lists of role (system, user, assistant) and content; used in place of the other "
        "three columns. The last answer is the response."
    )
    prompt_template: Literal["chatglm2", "chatglm3", "none"] = declare(
        "How prompts are written: rounds of ChatGLM2, messages of roles of ChatGLM3, or the text as it is. Read from a given "
        "checkpoint [the base model's own]."
    )
    query_separator: str | None = declare(
        "Data sets: text between prompt and query, \\n for a line break; '' as in ChatGLM-Efficient-Tuning. Read from a "
        "given checkpoint [\\n]."
    )
    train_on_history: bool | None = declare(
        "Learn every answer of a dialogue, not the last one only. Read from a given checkpoint, else false."
    )
    source_prefix: str | None = declare("Text put before every prompt.")
    max_source_length: int | None = declare(
        "Longest prompt, in tokens; longer ones are cut at the end, those with earlier turns at their start. Read from "
        "a given checkpoint [1024]."
    )
    max_target_length: int | None = declare(
        "Longest response, in tokens; longer ones are cut at the end. Read from a given checkpoint [128]."
    )
    val_max_target_length: int | None = declare("The same for references in evaluation, in tokens [max_target_length].")
    check_data: bool = declare(
        "Read every data file that is named, print what is in it and one example, and stop there.", default=False
    )
    max_samples: int | None = declare("Use only the first n rows of every data file; the next three count before it.")
    max_train_samples: int | None = declare("Use only the first n training rows.")
    max_eval_samples: int | None = declare("Use only the first n validation rows.")
    max_predict_samples: int | None = declare("Use only the first n test rows.")
    ignore_pad_token_for_loss: bool = declare(
        "Train on responses only; false trains on prompt and padding as well.", default=True
    )
    overwrite_cache: bool = declare("Encode the rows again, whatever is cached.", default=False)
    preprocessing_num_workers: int | None = declare("Processes that encode rows; capped by rows and cores.")
    num_beams: int | None = declare("Beams when generating [1].")
    do_sample: bool = declare("Sample predictions as the official scripts do; false decodes greedily.", default=True)
    top_p: float = declare("Sampling: probability mass to choose from.", default=0.7)
    temperature: float = declare("Sampling: above 1 flatter, towards 0 greedy.", default=0.95)


def parse_flags(argv: list[str]) -> tuple[ModelArguments, DataTrainingArguments, dict, list[str]]:
    """(ModelArguments, DataTrainingArguments, {name: value} of the given flags of training, notes), without torch.

    One word that ends in .json, .yaml or .yml is read as a file of flags. Raises ValueError or FileNotFoundError for what
    cannot be meant; notes are lines to show the user.
    """
    if argv and argv[0].endswith((".json", *YAML_ENDS)):
        if len(argv) > 1:
            raise ValueError(f"{argv[0]} stands alone: {argv[1]} cannot be added behind it. Write it into the file.")
        argv = flags_of_file(argv[0])
    flags = flags_of_main()
    known = {name: flag for group in flags.values() for name, flag in group.items()}
    argv, notes = translate_flags(argv, known.keys())
    for name, values in split_flags(argv):
        if len(values) > 1 and name in known and "list" not in known[name].type:
            raise ValueError(
                f"Stray word {as_typed(values[1])}: it stands behind --{name} {as_typed(values[0])}, which takes one value. "
                "Remove the word; a flag begins with --, and a value with a space in it stands in quotes."
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
    if "stage" in given and "pre_seq_len" in given:  # which ChatGLM-Efficient-Tuning's old default would refuse
        given.setdefault("finetuning_type", "p_tuning")
    chosen = {title: {name: given[name] for name in group if name in given} for title, group in flags.items()}
    if str(given.get("general_file")).lower() in ("none", ""):
        chosen["training"].pop("general_file", None)
    for group in chosen.values():
        group.update({name: seen_from_caller(group[name]) for name in READ if name in group})
    model_args, data_args = ModelArguments(**chosen["model"]), DataTrainingArguments(**chosen["data"])
    if data_args.query_separator:
        data_args.query_separator = data_args.query_separator.replace("\\n", "\n").replace("\\t", "\t")
    if data_args.messages_column and given.keys() & {"prompt_column", "response_column", "history_column"}:
        notes.append("--messages_column holds whole dialogues; the other column flags are not read.")
    model_args.stage = given.get("stage")
    if data_args.train_on_history and model_args.stage not in (None, "sft"):
        notes.append(f"--train_on_history is not read: --stage {model_args.stage} is about the last answers.")
    if model_args.stage == "ppo" and (unread := [f"--{name}" for name in SAMPLING if name in given]):
        notes.append(f"{', '.join(unread)} is not read: --stage ppo draws every token as likely as the model says.")
    if model_args.stage and EFFICIENT_TUNING.keys() - given.keys():
        left = ", ".join(f"--{name} {value}" for name, value in EFFICIENT_TUNING.items() if name not in given)
        notes.append(f"--stage {model_args.stage}: where no checkpoint says otherwise, its old defaults hold: {left}.")
    if data_args.dataset:
        replaced = ["train_file"] if given.get("do_train") else ["validation_file", "test_file"]
        notes += [f"--{name} {given[name]} is not read: --dataset counts." for name in replaced if name in given]
    if data_args.check_data:
        chosen["training"].update(what_to_check(data_args, given))
    if (
        given.get("load_best_model_at_end")
        and "eval_strategy" not in given
        and (data_args.dev_ratio or data_args.validation_file)
    ):
        strategy = given.get("save_strategy", "steps")
        if strategy in ("steps", "epoch"):
            chosen["training"].update(
                eval_strategy=strategy, eval_steps=given.get("eval_steps", given.get("save_steps", 500))
            )
            notes.append(
                f"--load_best_model_at_end needs a dev loss, so --eval_strategy {strategy}: one at every save."
            )
    defaults = {flag.name: flag.default for flag in flags["training"].values()}
    training_args = SimpleNamespace(**{**defaults, **chosen["training"]})
    check_own_flags(training_args, defaults)
    check(model_args, data_args, training_args)
    return model_args, data_args, chosen["training"], notes


def flags_of_main() -> dict[str, dict]:
    """{title in --help: {name: Flag}} of all that main.py reads."""
    return {
        "model": own_flags(ModelArguments),
        "data": own_flags(DataTrainingArguments),
        "training": {**library_flags(), **own_flags(TrainingArguments)},
    }


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

    from training.arguments import make_training_arguments  # loads torch

    training_args, more_notes = make_training_arguments(given, spread=bool(model_args.device_map))
    return model_args, data_args, training_args, notes + more_notes


def check(model_args, data_args, training_args):
    """Raise ValueError for values that contradict each other, before anything is read."""
    if not training_args.output_dir:
        raise ValueError("--output_dir is missing: the folder for checkpoints and results, such as output/my-run.")
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    for split, file in FILES.items():
        if getattr(training_args, f"do_{split}") and source_of(split, data_args, training_args) is None:
            raise ValueError(f"--do_{split} needs --{file}{'' if data_args.dataset else ', or --dataset'}.")
    if training_args.eval_strategy != "no" and not (data_args.validation_file or data_args.dev_ratio):
        raise ValueError(f"--eval_strategy {training_args.eval_strategy} needs --validation_file or --dev_ratio.")
    check_mixture(data_args)
    if scores_answers(training_args) and not data_args.messages_column:
        check_columns(data_args.prompt_column, data_args.response_column, "--prompt_column and --response_column")
    for group in (model_args, data_args, training_args):
        check_ranges(group)
    check_quantization_bit(model_args.quantization_bit)
    if model_args.quantize_output_layer and training_args.do_train:
        raise ValueError(
            "--quantize_output_layer is for answers; its loss would not be the model's. Leave it out in training."
        )
    check_device_map(model_args, training_args)
    check_precision(training_args)
    check_keeping(model_args, training_args)
    for name, reason in UNSUPPORTED.items():
        if getattr(training_args, name) not in (None, False):
            raise ValueError(f"--{name} {reason} Leave it out.")
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


def check_precision(training_args):
    """ValueError for flags that ask for two different precisions, or for a recipe that the official one is not."""
    halves = [name for name in ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval") if getattr(training_args, name)]
    if training_args.precision == "official" and training_args.auto_find_batch_size:
        raise ValueError(
            "--precision official and --auto_find_batch_size contradict each other: in the official recipe another "
            "batch size is another loss. Leave one of the two out."
        )
    if training_args.precision == "official" and training_args.label_smoothing_factor:
        raise ValueError(
            "--precision official and --label_smoothing_factor contradict each other: the official loss smooths nothing. "
            "Leave one of the two out."
        )
    if training_args.precision == "official" and halves:
        raise ValueError(
            f"--precision official and --{halves[0]} contradict each other: the official recipe is float16 weights "
            f"without loss scaling. Leave one of the two out."
        )


def check_keeping(model_args, training_args):
    """ValueError where --keep_base has no prompts, or no base that it could keep."""
    keeps, method = training_args.keep_base, model_args.finetuning_type or default_method(model_args.stage)
    if not keeps:
        return
    if not training_args.general_file:
        raise ValueError(
            f"--keep_base {keeps:g} needs --general_file, rows with general prompts; answers are not needed."
        )
    if training_args.precision == "official":
        raise ValueError(
            "--precision official and --keep_base contradict each other: the official loss is that of the rows alone. "
            "Leave one of the two out."
        )
    if method not in SWAPPED:
        raise ValueError(
            f"--keep_base {keeps:g}: --finetuning_type {method} changes the base's own weights, and its answers with them. Give "
            f"--finetuning_type {' or '.join(SWAPPED)}, or leave --keep_base out and mix general rows with answers into the "
            "training rows (--dataset a,b)."
        )


# Flags of transformers that would change nothing here, or the loss.
UNSUPPORTED = {
    "use_liger_kernel": "has no kernels for ChatGLM2; this project computes the loss in parts in any case.",
    "parallelism_config": "divides a row over processes, and here each process computes whole rows.",
}
EXAMPLES = {"model_name_or_path": "THUDM/chatglm2-6b", "prompt_column": "content", "response_column": "summary"}


def check_complete(model_args, data_args, training_args):
    """Raise ValueError where flags and checkpoint together leave out what a run needs, or contradict each other."""
    check_method(model_args, training_args)
    check_stage(model_args, data_args, training_args)
    needs_prefix = RULES[model_args.finetuning_type or default_method(model_args.stage)].needs_prefix
    if training_args.do_train and needs_prefix and not model_args.pre_seq_len and not data_args.check_data:
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
        # Rows that are answered, and not scored, or that have two answers or a reward model for them
        if name == "response_column" and (answers_only or training_args.stage != "sft"):
            continue
        if not getattr(model_args if name == "model_name_or_path" else data_args, name):
            raise ValueError(f"--{name} is missing (for ADGEN: {example}).")


# ---- the demos and the export


LENGTHS_OF_ANSWERS = ("max_length", "max_new_tokens")
# What ChatGLM-Efficient-Tuning's demos can be asked for, and the ones here do in one way only.
ONE_WAY = {
    "top_k": (50, "a token is chosen from the 50 likeliest, as in the official demos; a lower --top_p leaves fewer"),
    "num_beams": (1, "an answer is written token by token; --do_predict of main.py searches with beams"),
    "repetition_penalty": (1.0, "repetition is not penalized, as in the official demos"),
}


def add_trained_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model the demos answer with, and the export writes."""
    parser.add_argument("--model_name_or_path", help="Base model: folder or hub id. Read from the checkpoint.")
    parser.add_argument(
        "--ptuning_checkpoint",
        "--checkpoint_dir",
        help="What was trained: a checkpoint folder, or a run (its best one, or else the last); several LoRA adapters "
        "with commas, to the demos also several prefixes.",
    )
    parser.add_argument("--model_family", choices=SUPPORTED, help="Where the base model's files leave it open.")
    parser.add_argument("--finetuning_type", choices=list(RULES), help="Not needed: read from the checkpoint.")
    parser.add_argument(
        "--device_map",
        choices=("auto",),
        help="auto: spread the model over all GPUs, and the CPU where they are too small.",
    )
    parser.add_argument("--cache_dir", help="Folder for models downloaded from the hub.")
    parser.add_argument("--model_revision", help="Branch, tag or commit on the hub.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    parser.set_defaults(notes=(), sampling={})


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all three demos share, with the official names."""
    add_trained_arguments(parser)
    parser.add_argument("--quantization_bit", type=int, help="4 or 8. Read from the checkpoint, else float weights.")
    parser.add_argument("--quantize_output_layer", action="store_true", help="The output layer in int8, too.")
    parser.add_argument(
        "--bf16",
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        help="Float weights in bfloat16; on a CPU half the memory of float32 [what the GPU has; float32 on a CPU].",
    )
    parser.add_argument("--pre_seq_len", type=int, help="Not needed: read from the checkpoint, only compared with it.")
    parser.add_argument(
        "--prompt_template", choices=TEMPLATES, help="Read from the checkpoint, else the base model's own."
    )
    parser.add_argument("--source_prefix", help="Text before every prompt. Read from the checkpoint.")
    parser.add_argument(
        "--auto",
        action="store_true",
        help="Answer as the model `auto` unless another is asked for: what its training prompts are like is answered by "
        "the checkpoint, all else by the base. A LoRA adapter needs it for that.",
    )
    parser.add_argument("--max_length", "--max_new_tokens", type=int, help="Longest answer, in new tokens [8192].")
    parser.add_argument("--top_p", type=float, help="Probability mass to choose from [0.8].")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token [0.95].")
    parser.add_argument(
        "--do_sample", type=true_or_false, nargs="?", const=True, default=True, help="false: as --temperature 0 [true]."
    )
    for name, (only, _) in ONE_WAY.items():
        parser.add_argument(f"--{name}", type=float, default=only, help=f"Accepted, with the value {only} only.")
    parser.add_argument("--concurrency", type=int, default=8, help="Answers computed at once [8].")
    parser.add_argument("--max_queue", type=int, default=64, help="Requests that may wait for a place [64].")
    parser.add_argument("--max_sessions", type=int, default=32, help="Conversations that keep their cache [32].")


def parse_demo_words(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """As parse_words, for a parser of add_model_arguments; `sampling` are the given settings of an answer."""
    args = parse_words(parser, argv, accepts_all=True)
    for name, (only, way) in ONE_WAY.items():
        if getattr(args, name) != only:
            raise ValueError(f"--{name} {getattr(args, name):g}: {way}. Leave it out.")
    sampling = {"max_new_tokens": args.max_length, "top_p": args.top_p, "temperature": args.temperature}
    if not args.do_sample:
        sampling["temperature"] = 0.0
    args.sampling = {name: value for name, value in sampling.items() if value is not None}
    return args


def parse_words(parser: argparse.ArgumentParser, argv: list[str], accepts_all=False) -> argparse.Namespace:
    """The words as `parser` reads them. ValueError for an unknown one, with the nearest flag there is.

    ChatGLM-Efficient-Tuning's programs read the flags of all others: where the parser `accepts_all`, `notes` has a line
    for each that changes nothing here.
    """
    parser.error = refuse
    args, unknown = parser.parse_known_args(argv)
    if accepts_all:
        names = [name for group in flags_of_main().values() for name in group]
        unknown, args.notes = without_accepted(unknown, {*names, *RENAMED, *RETIRED, *ONE_WAY, *LENGTHS_OF_ANSWERS})
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"python ptuning/{parser.prog} --help lists the flags."
        raise ValueError(f"Unknown {'flag' if unknown[0].startswith('-') else 'word'} {unknown[0]}. {hint}")
    check_ranges(args)
    if "quantization_bit" in args:
        check_quantization_bit(args.quantization_bit)
    return args


def without_accepted(words: list[str], accepted: set[str]) -> tuple[list[str], list[str]]:
    """(the words without the accepted flags and their values, a line for each of these)."""
    left, notes, taken = [], [], False
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--"):
            taken = name in accepted
            if taken:
                notes.append(f"--{name} is accepted and has no effect here: {RETIRED.get(name, 'main.py reads it')}.")
        if not taken:
            left.append(word)
    return left, notes
