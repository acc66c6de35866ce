"""Which rows a run reads of the files that its flags name.

Answers to the parts of the official `main.py` that read `train_file`, `validation_file` and `test_file`. It differs in
that several files can be mixed or divided. rows.py makes rows of a file, examples.py and encoding.py token ids of them.
"""

from dataclasses import dataclass, field
from functools import partial

from data.dataset_info import read_dataset_info
from data.description import describe_training
from data.encoding import encode_prediction, encode_prompts, encode_training
from data.examples import COLUMNS, load_examples, shown_columns
from data.mixture import draw_shares, hold_out, join, number_rows, numbers_in_file
from data.rows import read_rows
from data.sources import FILES, check_columns, source_of, split_ratios


@dataclass
class Splits:
    """The encoded rows (datasets) of a run; None, or none, where its flags ask for none."""

    train: object = None
    train_skipped: int = 0  # rows
    held_out: dict = field(default_factory=dict)  # what --dev_ratio takes of the training rows; see write_held_out
    dev: object = None  # with labels, for the dev loss
    dev_prompts: object = None  # the dev rows to be answered during training
    prompts: dict = field(default_factory=dict)  # {"eval" or "predict": (rows to be answered, number skipped)}


def read_splits(data_args, training_args, tokenizer, say):
    """The Splits that a run's flags ask for, for answers. Raises as read_split."""
    splits = Splits()
    files = {"data_args": data_args, "training_args": training_args, "tokenizer": tokenizer, "say": say}
    read = partial(read_split, **files)
    if training_args.do_train:
        splits.train, splits.train_skipped, splits.held_out = read_divided("train", encode=encode_training, **files)
        if training_args.eval_strategy != "no":
            splits.dev, _ = read("eval", encode=encode_training)
        elif (data_args.validation_file or data_args.dev_ratio) and not training_args.do_eval:
            unread = "--validation_file is" if data_args.validation_file else "The rows of --dev_ratio are"
            say(f"{unread} not read: --eval_strategy steps gives a dev loss, --do_eval metrics.")
    if splits.dev is not None and training_args.eval_with_generate:
        splits.dev_prompts, _ = read("eval", encode=encode_prediction)
    names = [name for name in ("eval", "predict") if getattr(training_args, f"do_{name}")]
    splits.prompts = {name: read(name, encode=encode_prediction) for name in names}
    return splits


def read_stage_splits(data_args, training_args, tokenizer, say, encode, load):
    """The Splits that a run on pairs or prompts asks for: dev rows also with --do_eval. Raises as read_split."""
    splits = Splits()
    files = {"data_args": data_args, "training_args": training_args, "tokenizer": tokenizer, "say": say}
    files |= {"encode": encode, "load": load}
    read = partial(read_split, **files)
    if training_args.do_train:
        splits.train, splits.train_skipped, splits.held_out = read_divided("train", **files)
    if training_args.do_eval or (training_args.do_train and training_args.eval_strategy != "no"):
        splits.dev, _ = read("eval")
    if training_args.do_predict:
        splits.prompts["predict"] = read("predict")
    return splits


def read_split(split, data_args, training_args, tokenizer, encode, say, load=load_examples):
    """(encoded rows, number of rows skipped) of one split. ValueError and FileNotFoundError name file, row or flag.

    `load` makes examples or pairs of a file. With --dev_ratio the training rows are what the dev rows leave over.
    """
    return read_divided(split, data_args, training_args, tokenizer, encode, say, load)[:2]


def read_divided(split, data_args, training_args, tokenizer, encode, say, load=load_examples):
    """What read_split gives, and third the rows that --dev_ratio holds out, as write_held_out takes them; {} without it."""
    divided = data_args.dev_ratio and split in ("train", "eval")
    keep_unlabelled = (encode is encode_prediction or split == "predict") and not divided
    keep_unlabelled = keep_unlabelled or encode is encode_prompts
    how = {"encode": encode, "keep_unlabelled": keep_unlabelled, "say": say, "load": load}
    files, parts, rows_skipped, notes = read_files(split, data_args, training_args, tokenizer, **how)
    held_out = {}
    seed = seed_of_rows(training_args)
    sizes = {name: len(part) for name, part in parts.items()}
    if split == "train" or divided:
        parts = draw_shares(parts, split_ratios(data_args.mix_ratios), seed)
    if "" not in parts and not (divided and split == "eval"):  # said for the training rows already
        for line in (*notes, describe_mixture(split, parts, sizes)):
            say(line)
    if divided:
        halves = {name: hold_out(part, data_args.dev_ratio, seed) for name, part in parts.items()}
        rows = join(dev if split == "eval" else rest for rest, dev in halves.values())
        held_out = {name: {**files[name], "rows": numbers_in_file(dev)} for name, (_, dev) in halves.items()}
        say(f"{split}: {len(rows)} rows, divided by --dev_ratio {data_args.dev_ratio}.")
        if split == "eval" and data_args.max_eval_samples:
            rows = rows.select(range(min(data_args.max_eval_samples, len(rows))))
    else:
        rows = join(parts.values())
    return rows, sum(rows_skipped.values()), held_out


def read_files(split, data_args, training_args, tokenizer, encode, keep_unlabelled, say, load=load_examples):
    """({name: arguments of `load`}, {name: encoded rows}, {name: number of rows skipped}, lines for the user) of the files
    of one split.

    Data sets have their names; the one file of a flag has the name "". A damaged cache is told to `say`. With
    --overwrite_cache the first process of a machine encodes anew, and the others read what it has written.
    """
    source = source_of(split, data_args, training_args)
    if source == "dev_ratio":
        source = "dataset" if data_args.dataset else "train_file"
    if source == "dataset":
        files, notes = read_dataset_info(data_args.dataset_dir, data_args.dataset, data_args.split)
    else:
        columns = {f"{name}_column": getattr(data_args, f"{name}_column", None) for name in COLUMNS}
        files, notes = {"": {"path": getattr(data_args, source), **columns}}, []
    name_of_limit = "max_train_samples" if data_args.dev_ratio and split == "eval" else f"max_{split}_samples"
    limit = getattr(data_args, name_of_limit) or data_args.max_samples
    if any(file.get("query_column") for file in files.values()):
        notes.append(
            f"A query stands behind its prompt and {data_args.query_separator!r}: --query_separator chooses, "
            "ChatGLM-Efficient-Tuning has nothing there."
        )
    for name, file in files.items():
        if file.get("query_column"):
            file["query_separator"] = data_args.query_separator
        if encode is encode_prediction and not file["messages_column"]:
            place = file.get("place")
            both = f'"prompt" and "response" of {place}' if place else "--prompt_column and --response_column"
            check_columns(file["prompt_column"], file["response_column"], both)
        if encode is encode_prompts:
            files[name] = {**file, "response_column": None}
        elif split == "predict" and load is load_examples:
            files[name] = without_missing_response(file, limit, say)
    cache = {"overwrite_cache": data_args.overwrite_cache and training_args.local_process_index == 0, "say": say}
    parts, rows_skipped = {}, {}
    for name, file in files.items():
        roles = {"keep_roles": True} if tokenizer.keeps_roles and load is load_examples else {}
        how = {"max_samples": limit, "keep_unlabelled": keep_unlabelled, **roles}
        examples, rows_skipped[name] = load(**file, **how, **cache)
        parts[name] = encode_rows(split, examples, data_args, tokenizer, encode, cache)
        if encode is encode_prediction:
            parts[name] = parts[name].add_column("prompt", examples["prompt"][:])
        if encode is encode_prediction and name:
            parts[name] = parts[name].add_column("dataset", [name] * len(examples))
        elif len(files) > 1:
            parts[name] = number_rows(parts[name], len(parts))
    return files, parts, rows_skipped, notes


def without_missing_response(file, limit, say):
    """The file with no response column if none of its rows to be answered has it, which `say` is told."""
    column, place = file["response_column"], file.get("place")
    if file["messages_column"]:
        return file
    if not column:
        flag = f'"response" of {place}' if place else "--response_column"
        say(f"{file['path']}: without {flag} its rows are answered, and not scored.")
        return file
    rows = read_rows(file["path"])[:limit]
    if any(column in row for row in rows):
        return file
    say(
        f"{file['path']} has no column {column!r}: its rows are answered, and not scored; its columns are: "
        f"{shown_columns(rows[0])}."
    )
    return {**file, "response_column": None}


def limits_of(split, data_args):
    """{"max_source_length", "max_target_length"} of the rows of a split, in tokens."""
    target = data_args.max_target_length if split == "train" else data_args.val_max_target_length
    return {"max_source_length": data_args.max_source_length, "max_target_length": target}


def encode_rows(split, examples, data_args, tokenizer, encode, cache):
    """The rows of one data file as `encode` makes them of a split; `cache` says how it uses its cache."""
    settings = {"source_prefix": data_args.source_prefix, "num_workers": data_args.preprocessing_num_workers}
    if encode not in (encode_prediction, encode_prompts):
        settings["ignore_pad_token_for_loss"] = data_args.ignore_pad_token_for_loss
    if encode is encode_training:
        settings["train_on_history"] = data_args.train_on_history
    return encode(examples, tokenizer, **limits_of(split, data_args), **settings, **cache)


def seed_of_rows(training_args) -> int:
    """The seed by which rows are chosen (--mix_ratios, --dev_ratio) and ordered: --data_seed, else --seed."""
    return training_args.seed if training_args.data_seed is None else training_args.data_seed


def describe_mixture(split, parts, sizes):
    """One line: the rows that each data set gives, of how many it has, and their share of all."""
    total = sum(map(len, parts.values()))
    shares = [f"{name} {len(part):,} of {sizes[name]:,} rows ({len(part) / total:.1%})" for name, part in parts.items()]
    return f"{split}: {', '.join(shares)}."


def check_data(
    data_args, training_args, tokenizer, seq_length: int, say, encode=encode_training, load=load_examples
) -> None:
    """Read every file that the flags name as training would; print what is in each, and one example."""
    for split, flag in FILES.items():
        if not getattr(training_args, f"do_{split}"):
            continue
        _, parts, rows_skipped, notes = read_files(
            split, data_args, training_args, tokenizer, encode, split == "predict", say, load
        )
        for note in notes:
            say(note)
        for name, rows in parts.items():
            check_fits(rows, seq_length, data_args)
            say(f"\n{split}: {f'data set {name}' if name else getattr(data_args, flag)}")
            limits, marked = (
                limits_of(split, data_args),
                "what the model learns" if split == "train" else "its reference",
            )
            say(describe_training(rows, tokenizer, skipped=rows_skipped[name], marked=marked, **limits))
        if split == "train" and data_args.dataset:
            shares = draw_shares(parts, split_ratios(data_args.mix_ratios), seed_of_rows(training_args))
            say("\n" + describe_mixture(split, shares, {name: len(rows) for name, rows in parts.items()}))
    say("\nNothing is wrong with these files. Without --check_data the run begins.")


def longest_example(dataset, data_args) -> int:
    """Tokens of the longest training example, as cut; of a pair its longer answer counts."""
    answers = [name for name in ("target_length", "rejected_target_length") if name in dataset.column_names]
    return max(
        min(source, data_args.max_source_length) + min(max(targets), data_args.max_target_length) + 1
        for source, *targets in zip(dataset["source_length"], *(dataset[name] for name in answers), strict=True)
    )


def check_fits(dataset, seq_length: int, data_args) -> None:
    """ValueError where a training example is longer than the model was made for."""
    longest = longest_example(dataset, data_args)
    if longest > seq_length:
        raise ValueError(
            f"The longest example has {longest} tokens, but the model was made for {seq_length} (seq_length in its "
            f"config.json). Lower --max_source_length {data_args.max_source_length} or "
            f"--max_target_length {data_args.max_target_length}."
        )
