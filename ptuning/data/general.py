"""General prompts, which a model answered before it was tuned: some to measure what it forgets, the others to keep it.

Answers to nothing in the official scripts. Their rows are read as those of training; answers in them are not used.
"""

from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from data.encoding import encode_prompts
from data.examples import load_examples, look_at_file, shown_columns
from data.rows import glance

MEASURED = 48  # prompts at most: their number decides what a measurement costs
LONGEST_PROMPT = 512  # tokens; longer prompts are left out, as what is cut is another question


@dataclass(frozen=True)
class Prompts:
    """Some prompts: their token ids, and what a reader sees of them."""

    ids: list[list[int]]
    texts: list[str]

    def __len__(self):
        return len(self.ids)

    def chosen(self, places) -> "Prompts":
        """Those at the places (indices)."""
        return Prompts([self.ids[place] for place in places], [self.texts[place] for place in places])


@dataclass(frozen=True)
class General:
    """The prompts of a file, divided: none is both learned and measured."""

    measured: Prompts
    kept: Prompts  # to be learned, no longer than a prompt of training


def columns_of(path: Path | str, data_args) -> dict[str, str | None]:
    """{"prompt_column", "history_column", "messages_column"} of a file of general prompts, by its first row.

    The columns of the run if they are there, else prompt, history and messages. ValueError without either.
    """
    row, _ = glance(path)
    row = {} if row is None else row
    names = dict.fromkeys(("prompt_column", "history_column", "messages_column"))
    for messages in filter(None, (data_args.messages_column, "messages")):
        if messages in row:
            return {**names, "messages_column": messages}
    for prompt, history in ((data_args.prompt_column, data_args.history_column), ("prompt", "history")):
        if prompt and (prompt in row or not row):
            return {**names, "prompt_column": prompt, "history_column": history if history in row else None}
    wanted = " or ".join(dict.fromkeys(repr(name) for name in (data_args.prompt_column, "prompt", "messages") if name))
    raise ValueError(
        f"--general_file {path} has no column {wanted}; its columns are: {shown_columns(row)}. Give rows with a prompt, "
        "and none of the columns else is needed."
    )


def look_at_general(path: Path | str, data_args) -> int | None:
    """The number of rows in a file of general prompts, as look_at_file; ValueError where its first row is faulty."""
    columns = {name.removesuffix("_column"): column for name, column in columns_of(path, data_args).items()}
    return look_at_file(path, {**columns, "query": None, "response": None}, keep_unlabelled=True)


def divide(count: int, most: int = MEASURED) -> tuple[list[int], list[int]]:
    """(places to measure, places to keep) of `count` rows: of every other row at most `most`, and all that are left."""
    others = range(0, count, 2)
    number = min(most, len(others))
    measured = [others[index * len(others) // number] for index in range(number)]
    return measured, sorted(set(range(count)) - set(measured))


def read_general(path: Path | str, data_args, tokenizer, seq_length: int, say) -> General:
    """The General prompts of a file. ValueError and FileNotFoundError name file, row and column."""
    columns = {**columns_of(path, data_args), "response_column": None}
    roles = {"keep_roles": True} if tokenizer.keeps_roles else {}
    examples, skipped = load_examples(path, **columns, keep_unlabelled=True, **roles, say=say)
    longest = min(max(LONGEST_PROMPT, data_args.max_source_length), seq_length // 2)
    limits = {"max_source_length": longest, "max_target_length": data_args.max_target_length}
    encoded = encode_prompts(examples, tokenizer, **limits, source_prefix=data_args.source_prefix, say=say)
    texts = [
        "\n".join([*(text for turn in history for text in turn), prompt])
        for prompt, history in zip(examples["prompt"][:], examples["history"][:], strict=True)
    ]
    lengths = encoded["source_length"][:]
    fit = [length <= longest for length in lengths]
    if left_out := skipped + fit.count(False):
        say(f"{path}: {left_out} rows are left out, empty or longer than {longest} tokens.")
    prompts = Prompts(list(compress(encoded["input_ids"][:], fit)), list(compress(texts, fit)))
    if not len(prompts):
        raise ValueError(f"--general_file {path}: no prompt in it has {longest} tokens or fewer. Give shorter ones.")
    measured, kept = divide(len(prompts))
    short = [place for place in kept if len(prompts.ids[place]) <= data_args.max_source_length]
    return General(prompts.chosen(measured), prompts.chosen(short))
