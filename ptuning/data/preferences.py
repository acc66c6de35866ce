"""Rows -> pairs: a prompt with its history, and two answers to it, of which one is preferred.

Answers to the pairwise data of ChatGLM-Efficient-Tuning, whose response column holds [better, worse, …], and to the
`chosen` and `rejected` of LLaMA-Factory's rankings. It differs in that two answers that are equal, or are so once they
are cut, are left out and counted: they teach nothing.
"""

import os

from common.messages import silent
from data.encoding import _encode, _encode_training_batch
from data.examples import (
    COLUMNS,
    _dialogue,
    _history,
    _missing_column,
    _names_of,
    _text,
    checked,
    flag_of,
    read_once,
    shown_columns,
    without_skipped,
)
from data.mixture import shown_rows
from data.rows import glance, kind_of_value, read_rows

CHOSEN, REJECTED = "chosen", "rejected"
NOTED = ("equal", "more")  # of a row: that its two answers are equal, that it has more than two


def _answer(name, number, column, row, flag):
    """The text of an answer: text, a message of the assistant, or a list of that one message; "" for null."""
    value = row[column]
    message = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        value = message.get("content", message.get("value"))
        if role not in ("assistant", "gpt") or not isinstance(value, str):
            raise ValueError(
                f"{name} row {number}: column {column!r} ({flag}) holds a message of role {role!r}; expected an answer: "
                "text, or a message of the assistant"
            )
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{name} row {number}: column {column!r} ({flag}) holds {kind_of_value(value)}, expected the text of an answer"
        )
    return checked(value, f"{name} row {number}", column)


def _pair_of(row, number, path, columns, flags, taken, single, query_separator="\n"):
    """(prompt, chosen, rejected, history) of a row; rejected is None where `single` lets one answer do.

    ValueError where its columns are not as they should be.
    """
    if columns["messages"]:
        prompt, _, history = _dialogue(path, number, columns["messages"], row, flags["messages"], keep_unlabelled=True)
    else:
        prompt = _text(path, number, columns["prompt"], row, flags["prompt"], taken["prompt"])
        if columns["query"] in row and (query := _text(path, number, columns["query"], row, flags["query"])):
            prompt += query_separator + query
        history = _history(path, number, columns["history"], row, flags["history"])
    response = columns["response"]
    if isinstance(row.get(response), list):
        answers = row[response]
        if len(answers) < 2:
            raise ValueError(
                f"{path} row {number}: column {response!r} ({flags['response']}) holds a list of {len(answers)}, expected "
                "[the better answer, the worse answer]"
            )
        both = {f"{response}[{place}]": answer for place, answer in enumerate(answers[:2])}
        chosen, rejected = (_answer(path, number, column, both, flags["response"]) for column in both)
    elif columns[CHOSEN] in row or columns[REJECTED] in row:
        for name in (CHOSEN, REJECTED):
            if columns[name] not in row:
                raise ValueError(
                    f"{path} row {number} has a {columns[CHOSEN if name == REJECTED else REJECTED]!r} answer, but no "
                    f"{columns[name]!r} one; its columns are: {shown_columns(row)}"
                )
        chosen, rejected = (_answer(path, number, columns[name], row, flags[name]) for name in (CHOSEN, REJECTED))
    elif single and response in row:
        chosen, rejected = _text(path, number, response, row, flags["response"], taken["response"]), None
    else:
        raise ValueError(
            f"{path} row {number} has no two answers: expected columns {columns[CHOSEN]!r} and {columns[REJECTED]!r}, or a "
            f"list [better, worse] in the column of --response_column; its columns are: {shown_columns(row)}"
        )
    return prompt, chosen, rejected, history


def _flags_of(place):
    """How a user names the columns of the answers, which have no flag of their own."""
    words = {CHOSEN: "the better answer", REJECTED: "the worse answer"}
    return {name: flag_of(place, name) if place else word for name, word in words.items()}


def _generate_pairs(path, columns, query_separator, place, max_samples, single, key):
    """Every row of the file, those to be skipped marked."""
    rows = read_rows(path)
    flags, taken = _names_of(columns, place)
    flags |= _flags_of(place)
    query = columns["query"]  # may be absent from a row, but not from all
    if query and not columns["messages"] and not any(query in row for row in rows):
        raise _missing_column(path, 1, query, rows[0], flags["query"], taken["query"])
    for number, row in enumerate(rows[:max_samples], start=1):
        prompt, chosen, rejected, history = _pair_of(row, number, path, columns, flags, taken, single, query_separator)
        answers = [answer.strip() for answer in (chosen, rejected) if answer is not None]
        equal = len(answers) == 2 and answers[0] == answers[1] != ""
        skipped = not prompt.strip() or not all(answers) or equal
        pair = {"prompt": prompt, CHOSEN: chosen, REJECTED: rejected, "history": history, "row": number}
        ranked = row.get(columns["response"])
        yield {**pair, "skipped": skipped, "equal": equal, "more": isinstance(ranked, list) and len(ranked) > 2}


def look_at_pairs(path: str | os.PathLike, columns: dict, single: bool = False) -> int | None:
    """The number of rows in a data file, None where counting takes long. ValueError where its first row is faulty.

    `columns` are {column: its name}. Where a checkpoint may yet name the prompts, no row is looked at.
    """
    columns = {CHOSEN: CHOSEN, REJECTED: REJECTED, **columns}
    row, count = glance(path)
    if row is not None and (columns["messages"] or columns["prompt"]):
        flags, taken = _names_of(columns)
        _pair_of(row, 1, path, columns, flags | _flags_of(None), taken, single)
    return count


def load_pairs(
    path: str | os.PathLike,
    max_samples: int | None = None,
    keep_unlabelled: bool = False,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    query_separator: str = "\n",
    place: str | None = None,
    overwrite_cache: bool = False,
    say=silent,
    **columns,
):
    """The usable pairs of a data file as (datasets.Dataset, number of rows skipped).

    Columns: `prompt`, `chosen` and `rejected` (text), `history` (list of [question, answer]), `row` (1-based, in the
    file). `columns` are those of load_examples; a response column that holds [better, worse] gives both answers. Rows
    with an empty prompt or answer, or two equal ones, are skipped, of which `say` is told. With `keep_unlabelled` a row
    with one answer will do, the response: its `rejected` is None. Errors and caching are as of load_examples.
    """
    names = {name: columns.get(f"{name}_column") for name in COLUMNS}
    names |= {CHOSEN: chosen_column or CHOSEN, REJECTED: rejected_column or REJECTED}
    settings = {
        "path": str(path),
        "columns": names,
        "query_separator": query_separator,
        "place": place,
        "max_samples": max_samples,
        "single": keep_unlabelled,
    }
    features = dict.fromkeys(("prompt", CHOSEN, REJECTED), "string") | {"row": "int64"}
    features |= dict.fromkeys(("skipped", *NOTED), "bool")
    dataset = read_once(path, _generate_pairs, features, settings, overwrite_cache, say)
    if names["history"] and not any(dataset["history"][:]):
        say(f"{path}: no row has earlier turns in a column {names['history']!r}.")
    equal, more = (
        [row for row, holds in zip(dataset["row"][:], dataset[name][:], strict=True) if holds] for name in NOTED
    )
    if equal:
        say(f"{path}: {len(equal)} pairs of two equal answers are left out, row {shown_rows(equal, 8)}.")
    if more:
        say(
            f"{path}: {len(more)} rows have more than two answers, row {shown_rows(more, 8)}. The first two are read, as in "
            "ChatGLM-Efficient-Tuning."
        )
    dataset, skipped = without_skipped(dataset.remove_columns(list(NOTED)))
    if not len(dataset):
        raise ValueError(
            f"{path} holds no pair to learn from: of its {skipped} rows {len(equal)} have two equal answers, and the others "
            "an empty prompt or answer"
        )
    return dataset, skipped


def _encode_pair_batch(examples, **settings):
    """The encoding of prompt and chosen answer, and under rejected_… that of the same prompt and the other answer."""
    chosen, rejected = examples[CHOSEN], examples[REJECTED]
    features = _encode_training_batch({**examples, "response": chosen}, **settings)
    others = _encode_training_batch({**examples, "response": [text or "" for text in rejected]}, **settings)
    missing = [text is None for text in rejected]
    for name in ("input_ids", "labels"):
        features[f"rejected_{name}"] = [[] if alone else ids for alone, ids in zip(missing, others[name], strict=True)]
    features["rejected_target_length"] = others["target_length"]
    features["length"] = [max(pair) for pair in zip(features["length"], others["length"], strict=True)]
    return features


def encode_pairs(
    dataset,
    tokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    ignore_pad_token_for_loss: bool = True,
    say=silent,
    **how,
):
    """Dataset of what encode_training makes of the prompt with the chosen answer, and with the rejected one.

    The latter has `rejected_input_ids` and `rejected_labels`, empty where there is none, and `rejected_target_length`;
    `length` is that of the longer one. Pairs that are equal once they are cut are left out, which `say` is told.
    ValueError where all are.
    """
    settings = {
        "source_prefix": source_prefix,
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
        "ignore_pad_token_for_loss": ignore_pad_token_for_loss,
    }
    columns = ("source_length", "target_length", "rejected_target_length", "length", "dropped_turns", "row")
    lists = ("input_ids", "labels", "rejected_input_ids", "rejected_labels")
    encoded = _encode(dataset, _encode_pair_batch, columns, tokenizer, settings, lists=lists, say=say, **how)
    pairs = zip(encoded["input_ids"], encoded["rejected_input_ids"], strict=True)
    kept = [index for index, (chosen, rejected) in enumerate(pairs) if chosen != rejected]
    if len(kept) == len(encoded):
        return encoded
    cut = f"equal once their answers are cut to --max_target_length {max_target_length}"
    if not kept:
        raise ValueError(f"All {len(encoded)} pairs are {cut}: raise it, there is nothing to learn from")
    say(f"{len(encoded) - len(kept)} of {len(encoded)} pairs are {cut}, and are left out.")
    return encoded.select(kept)
