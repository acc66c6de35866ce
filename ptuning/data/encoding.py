"""Examples -> token ids and labels.

Answers to preprocess_function_train and preprocess_function_eval of the official `main.py`: same ids, same labels.
It differs in that a dialogue that is too long loses its oldest turns instead of its question, and that rows are not
padded here.
"""

import hashlib
import json
import os
from bisect import bisect_left
from functools import partial

from common.messages import cut_short, silent
from data.cache import cached
from data.examples import ROWS_WORTH_A_PROGRESS_BAR, code_sha256, progress_bars

IGNORED_LABEL = -100
ROWS_PER_WORKER = 10_000  # fewer are encoded sooner than a process starts


def check_lengths(tokenizer, source_prefix: str, max_source_length: int, max_target_length: int) -> None:
    """ValueError when prompts or responses would be cut to nothing."""
    minimum = len(tokenizer.encode_prompt("", source_prefix=source_prefix))
    if max_source_length < minimum:
        raise ValueError(
            f"--max_source_length {max_source_length} cannot hold the fixed part of every prompt, {minimum} tokens "
            f"of {cut_short(source_prefix + tokenizer.build_prompt('…'))!r}; set at least {minimum} plus your questions"
        )
    if max_target_length < 1:
        raise ValueError(f"--max_target_length {max_target_length} leaves no token of the response; set 1 or more")


def _cut_question(tokenizer, question: str, limit: int, source_prefix: str, role: str) -> list[int]:
    """Ids of the prompt of a question alone, which loses its end and keeps the answer marker behind it."""

    def encode(length):
        return tokenizer.fit_prompt(question[:length], [], limit, source_prefix, role)[0]

    # check_lengths has made sure that the empty question fits.
    return encode(bisect_left(range(1, len(question) + 1), True, key=lambda length: len(encode(length)) > limit))


def _encode_sources(examples, tokenizer, source_prefix, max_source_length):
    """Ids of each prompt within `max_source_length`, special tokens included, its length before cutting, and the
    number of turns it lost.

    A prompt without a history loses its end, the answer marker included, as in the official script.
    """
    questions, histories = examples["prompt"], examples["history"]
    roles = examples["role"] if "role" in examples else ["user"] * len(questions)
    sources, lengths, dropped_turns = [], [], []
    for index, source in enumerate(tokenizer.encode_prompts(questions, histories, source_prefix, roles)):
        dropped = 0
        lengths.append(len(source))
        if len(source) > max_source_length:
            history = histories[index]
            if history or tokenizer.keeps_roles:
                how = max_source_length, source_prefix, roles[index]
                source, dropped = tokenizer.fit_prompt(questions[index], history, *how)
                if len(source) > max_source_length:
                    source, dropped = _cut_question(tokenizer, questions[index], *how), len(history)
            source = tokenizer.cut_prompt(source, max_source_length)
        sources.append(source)
        dropped_turns.append(dropped)
    return sources, lengths, dropped_turns


def _encode_training_batch(
    examples,
    tokenizer,
    source_prefix,
    max_source_length,
    max_target_length,
    ignore_pad_token_for_loss,
    train_on_history=False,
):
    pad, end, learned_of_prompt = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.learned_of_prompt
    ignored = IGNORED_LABEL if ignore_pad_token_for_loss else pad
    max_source_length, max_target_length = tokenizer.training_limits(max_source_length, max_target_length)
    sources, source_lengths, dropped_turns = _encode_sources(examples, tokenizer, source_prefix, max_source_length)
    targets = tokenizer.encode_answers(examples["response"], _metadata_of(examples))
    features = {
        "input_ids": [],
        "labels": [],
        "source_length": source_lengths,
        "target_length": [len(target) for target in targets],
        "length": [],
        "dropped_turns": dropped_turns,
        "row": examples["row"],
    }
    for index, (source, target, row) in enumerate(zip(sources, targets, examples["row"], strict=True)):
        answer = learned = target[:max_target_length] + [end]
        features["input_ids"].append(source + answer)
        features["length"].append(len(source) + len(answer))
        # The pad token is also the unknown token; as in the official script it teaches nothing in an answer either.
        if pad in answer:
            learned = [ignored if token == pad else token for token in answer]
            if not any_supervised([ignored, *learned]):
                raise ValueError(
                    f"row {row} has nothing to learn: every token of its response, the end included, is the padding or "
                    f"unknown token (id {pad}). Leave the row out, or check tokenizer.model and eos_token_id"
                )
        before = [ignored] * (len(source) - learned_of_prompt)
        if learned_of_prompt:
            before += source[-learned_of_prompt:]
        if train_on_history and (history := tokenizer.kept_history(examples["history"][index], dropped_turns[index])):
            for first, last in tokenizer.answers_in(source, history, source_prefix):
                before[first:last] = [ignored if token == pad else token for token in source[first:last]]
                before[last] = tokenizer.label_behind(source[last])
        features["labels"].append(before + learned)
    return features


def _metadata_of(examples):
    """What stands on the first line of each answer, where the rows have it."""
    return examples["metadata"] if "metadata" in examples else None


def encoded_by(tokenizer) -> list[str]:
    """What decides the ids of a text beside the code: vocabulary, tokenizer and template."""
    return [tokenizer.model_sha256, type(tokenizer).__module__, tokenizer.prompt_template]


def any_supervised(labels: list[int]) -> bool:
    """True where a row teaches something. Its first token is predicted from nothing and never counts."""
    return labels[1:].count(IGNORED_LABEL) < len(labels) - 1


def _encode_prediction_batch(examples, tokenizer, source_prefix, max_source_length, max_target_length):
    sources, _, dropped_turns = _encode_sources(examples, tokenizer, source_prefix, max_source_length)
    labels = tokenizer.encode_answers(examples["response"], _metadata_of(examples))
    room = max(0, max_target_length - len(tokenizer.with_ends([])))
    return {
        "input_ids": sources,
        "labels": [tokenizer.with_ends(ids[:room]) for ids in labels],
        "row": examples["row"],
        "dropped_turns": dropped_turns,
    }


def _encode(
    dataset,
    encode_batch,
    columns,
    tokenizer,
    settings,
    *,
    lists=("input_ids", "labels"),
    num_workers=None,
    overwrite_cache=False,
    say=silent,
):
    """`encode_batch` mapped over the dataset, cached by rows, vocabulary, settings and code.

    `columns`: what it returns beside the `lists`. At most `num_workers` processes encode; `say`
    is told where the cache is damaged.
    """
    from datasets import Features, List, Value

    check_lengths(tokenizer, *map(settings.get, ("source_prefix", "max_source_length", "max_target_length")))
    # Named, because to find out the types of lists datasets looks at each of their numbers.
    features = dict.fromkeys(lists, List(Value("int32"))) | dict.fromkeys(columns, Value("int64"))
    # datasets' own fingerprint names the functions, and does not notice a change in them.
    key = json.dumps([dataset._fingerprint, encode_batch.__name__, *encoded_by(tokenizer), code_sha256(), settings])
    workers = max(1, min(num_workers or 1, len(dataset) // ROWS_PER_WORKER, os.cpu_count() or 1))

    def build(folder):
        with progress_bars(len(dataset) >= ROWS_WORTH_A_PROGRESS_BAR):
            return dataset.map(
                partial(encode_batch, tokenizer=tokenizer, **settings),
                batched=True,
                remove_columns=dataset.column_names,
                features=Features(features),
                num_proc=workers if workers > 1 else None,
                load_from_cache_file=True,
                cache_file_name=folder and str(folder / "encoded.arrow"),
                new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
                desc="Encoding",
            )

    if not dataset.cache_files:  # rows that are in memory only
        return build(None)
    return cached(key, build, what="its rows are encoded", overwrite=overwrite_cache, say=say)


def encode_training(
    dataset,
    tokenizer,
    *,
    max_source_length: int,
    max_target_length: int,
    source_prefix: str = "",
    ignore_pad_token_for_loss: bool = True,
    train_on_history: bool = False,
    **how,
):
    """Dataset of `input_ids` = prompt + response + end, and `labels`, which are ignored over the prompt.

    The prompt is cut on the right to `max_source_length` tokens, `[gMASK] sop` included, the response to
    `max_target_length` before its end token. A prompt with a history loses its oldest turns instead (their number
    is `dropped_turns`), then the end of its question. No padding. `source_length` and `target_length` are the token
    counts before cutting, `row` the number in the file. Ignored labels are -100, or the pad token without
    `ignore_pad_token_for_loss`. With `train_on_history` the earlier answers of a dialogue have labels, too: their tokens,
    and the end token in the place behind them. `how`: num_workers, overwrite_cache and say of _encode. Raises ValueError for a row
    without a single supervised token.
    """
    settings = {
        "source_prefix": source_prefix,
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
        "ignore_pad_token_for_loss": ignore_pad_token_for_loss,
        "train_on_history": train_on_history,
    }
    columns = ("source_length", "target_length", "length", "dropped_turns", "row")
    return _encode(dataset, _encode_training_batch, columns, tokenizer, settings, **how)


def encode_prediction(
    dataset, tokenizer, *, max_source_length: int, max_target_length: int, source_prefix: str = "", **how
):
    """Dataset of `input_ids` = the prompt alone, `labels` = the reference response, `row` and `dropped_turns`.

    As in the official script the labels start with `[gMASK] sop`, which count among `max_target_length`. `how`:
    num_workers, overwrite_cache and say of _encode.
    """
    settings = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    settings["source_prefix"] = source_prefix
    return _encode(dataset, _encode_prediction_batch, ("row", "dropped_turns"), tokenizer, settings, **how)


def _encode_prompt_batch(examples, tokenizer, source_prefix, max_source_length, max_target_length):
    sources, lengths, dropped_turns = _encode_sources(examples, tokenizer, source_prefix, max_source_length)
    return {
        "input_ids": sources,
        "source_length": lengths,
        "target_length": [max_target_length] * len(sources),
        "length": list(map(len, sources)),
        "dropped_turns": dropped_turns,
        "row": examples["row"],
    }


def encode_prompts(
    dataset, tokenizer, *, max_source_length: int, max_target_length: int, source_prefix: str = "", **how
):
    """Dataset of `input_ids` = the prompt alone, to be answered with `max_target_length` tokens at most.

    `source_length`, `length`, `dropped_turns` and `row` are those of encode_training, `target_length` what an answer may
    have. `how`: num_workers, overwrite_cache and say of _encode.
    """
    settings = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    settings["source_prefix"] = source_prefix
    columns = ("source_length", "target_length", "length", "dropped_turns", "row")
    return _encode(dataset, _encode_prompt_batch, columns, tokenizer, settings, lists=("input_ids",), **how)


def digest(dataset) -> str:
    """Names the token ids of an encoded dataset and their order, whatever file they came from."""
    sha256 = hashlib.sha256()
    names = [name for name in ("input_ids", "rejected_input_ids") if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(10_000):
        for ids in (chunk for name in names for chunk in batch[name].chunks):
            sha256.update(ids.value_lengths().to_numpy().tobytes())
            sha256.update(ids.flatten().to_numpy().tobytes())
    return sha256.hexdigest()[:16]
