"""File -> rows -> token ids and label mask -> batches.

Answers to the data half of the official `main.py`: load_dataset, preprocess_function_train / _eval, the data
collators. Same ids and labels. What differs: files may be JSON lines, a JSON array or CSV in UTF-8, UTF-16 or
GB18030; every defect is one error that names file and row; rows without a prompt or response are skipped and
counted; a dialogue that is too long loses its oldest turns instead of its question; features are padded to the
longest of their batch instead of to max_source + max_target + 1.

Reading path: read_rows (bytes -> rows), load_examples (rows -> checked columns), encode_training and
encode_prediction (columns -> ids and labels), draw_shares and hold_out (several data sets -> one, and dev rows),
collate_training and collate_prediction (features -> tensors).
"""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import os
import random
from bisect import bisect_left
from functools import partial
from pathlib import Path

from claims import MOST_JSON_BYTES, check_size, path_inside
from conversation import conversation
from data_cache import cached, nobody
from quoting import as_typed, flag_as_typed
from text import DuplicateKey, decode_text, load_json, parse_json

IGNORED_LABEL = -100
DATASET_INFO_FILE = "dataset_info.json"
COLUMNS = ("prompt", "query", "response", "history", "messages")
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}  # of an entry that names none
ROWS_PER_WORKER = 10_000  # fewer are encoded sooner than a process starts
ROWS_WORTH_A_PROGRESS_BAR = 20_000
ROWS_OF_A_DATASET = 2**32  # more than any file has: keeps the row numbers of several data sets apart


# ---- text -> rows


def _shown(text: str, length: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= length else text[:length] + "…"


def _kind(value) -> str:
    """The type of a JSON value in words, with the value where it is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"text ({_shown(value, 20)!r})"
    return {list: "a list", dict: "an object"}[type(value)]


def _duplicate_key(name: str, row: int, line: int, error: DuplicateKey) -> ValueError:
    return ValueError(
        f"{name} row {row} (line {line}) has the key {_shown(error.key)!r} twice in one object, of which only one could "
        "be read; rename or remove one"
    )


def _parse_json_lines(text: str, name: str) -> list[dict]:
    rows = []
    # Not splitlines(): JSON text may hold line separators other than \n, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, unique_keys=True)
        except DuplicateKey as error:
            raise _duplicate_key(name, len(rows) + 1, number, error) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} line {number} is not JSON ({error.msg}, column {error.colno}): {_shown(line)}\n"
                "Expected one whole JSON object per line, or one JSON array of objects."
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{name} line {number} is {_kind(row)}, not a JSON object: {_shown(line)}\n"
                'Expected lines such as {"content": "...", "summary": "..."}.'
            )
        rows.append(row)
    return rows


def _parse_json_array(text: str, name: str) -> list[dict]:
    try:
        rows = parse_json(text, unique_keys=True)
    except DuplicateKey as error:
        raise _duplicate_key(name, error.element, error.lineno, error) from None
    except json.JSONDecodeError as error:
        # An array may be one line of megabytes: show what surrounds the error instead of the line's start.
        around = " ".join(text[max(0, error.pos - 30) : error.pos + 30].split())
        raise ValueError(
            f"{name} line {error.lineno} breaks the JSON array ({error.msg}, column {error.colno}) near: {around}\n"
            "Repair it there, or write one JSON object per line."
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{name} row {number} is {_kind(row)}, not a JSON object; expected an array of objects")
    return rows


def _parse_csv(text: str, name: str) -> list[dict]:
    lines = list(io.StringIO(text, newline=""))  # as the reader counts them
    reader = csv.reader(lines, strict=True)
    header, rows = None, []
    start = 1  # line of the file at which the next row starts; a quoted cell may span several
    try:
        for cells in reader:
            if cells and header is None:
                header = cells
                twice = next((column for column in header if header.count(column) > 1), None)
                if twice is not None:
                    raise ValueError(f"{name}: its header names the column {twice!r} twice; rename or remove one")
            elif cells:
                if len(cells) != len(header):
                    extra = cells[len(header) :]
                    detail = f"; the first cell too many is {_shown(extra[0])!r}" if extra else ""
                    raise ValueError(
                        f"{name} row {len(rows) + 1} (line {start}) has {len(cells)} cells but the header names "
                        f"{len(header)} columns{detail}\nPut cells that contain commas or line ends in double quotes."
                    )
                rows.append(dict(zip(header, cells, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{name} row {len(rows) + 1} (line {start}) is not CSV ({error}): {_shown(lines[start - 1])}\n"
            'A double quote inside a quoted cell is written twice: "".'
        ) from None
    return rows


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a data file in it, such as {path / 'train.json'}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; copy what it gives into one and name that")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (looked for {path.absolute()}); check the data file's name")
    return path.read_bytes()


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines, JSON-array or (by its suffix) CSV file, in order, as dicts.

    FileNotFoundError or ValueError, each naming the file and where it has one the line, for a file that is missing,
    a folder, empty, not text, or not in one of these formats.
    """
    path = Path(path)
    text = decode_text(_read_bytes(path), str(path))
    if not text.strip():
        raise ValueError(f"{path} is empty; expected JSON lines, a JSON array or CSV")
    if path.suffix.lower() == ".csv":
        rows = _parse_csv(text, str(path))
    elif text.lstrip().startswith("["):
        rows = _parse_json_array(text, str(path))
    else:
        rows = _parse_json_lines(text, str(path))
    if not rows:
        raise ValueError(f"{path} holds no rows; expected at least one example")
    return rows


# ---- rows -> examples


def _flag(place: str | None, column: str) -> str:
    """How a user names a column: by a flag, or in `place`, an entry of a dataset_info.json."""
    return f'"{column}" of {place}' if place else f"--{column}_column"


def _missing_column(name: str, number: int, column: str | None, row: dict, flag: str, taken=()) -> ValueError:
    """The error for a column that a row lacks; the hint names none of the `taken` ones, which have other flags."""
    columns = shown_columns(row)
    if not column:
        return ValueError(f"{flag} is not set; the columns of {name} are: {columns}; name one of them")
    near = difflib.get_close_matches(column, [other for other in row if other not in taken], n=1, cutoff=0.5)
    if not near:
        remedy = f"name one of them with {flag}"
    elif flag.startswith("--"):
        remedy = f"did you mean {flag_as_typed(flag, near[0])}?"
    else:
        remedy = f"is {near[0]!r} meant by {flag}?"
    return ValueError(f"{name} row {number} has no column {column!r}; its columns are: {columns}; {remedy}")


def shown_columns(row: dict) -> str:
    return ", ".join(map(as_typed, row)) or "none"


def _text(name: str, number: int, column: str | None, row: dict, flag: str, taken=()) -> str:
    """The text in a column, "" for null; ValueError where the column is missing or holds something else."""
    if column not in row:
        raise _missing_column(name, number, column, row, flag, taken)
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{name} row {number}: column {column!r} ({flag}) holds {_kind(value)}, expected text; "
            "put the value in double quotes or name another column"
        )
    return _checked(value, f"{name} row {number}", column)


def _checked(text: str, where: str, column: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: column {column!r} holds half a character (\\u{ord(text[error.start]):04x}) "
            f"at position {error.start}, such as a cut emoji leaves; write the whole character or remove it"
        ) from None
    return text


def _history(name: str, number: int, column: str | None, row: dict, flag: str) -> list[list[str]]:
    """Past [question, answer] turns; none where the column is missing or null in this row."""
    history = row.get(column) if column else None
    if history is None:
        return []
    expected = f"{name} row {number}: column {column!r} ({flag}) must be a list of [question, answer] pairs"
    if not isinstance(history, list):
        raise ValueError(f'{expected} of text, such as [["你好", "你好！"]], but is {_kind(history)}')
    for position, turn in enumerate(history, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            found = f"a list of {len(turn)}" if isinstance(turn, list) else _kind(turn)
            raise ValueError(f"{expected}, but its item {position} is {found}")
        for text in turn:
            if not isinstance(text, str):
                raise ValueError(f"{expected} of text, but its item {position} contains {_kind(text)}")
            _checked(text, f"{name} row {number}", column)
    return history


def _dialogue(
    name: str, number: int, column: str, row: dict, flag: str, keep_unlabelled: bool
) -> tuple[str, str, list]:
    """(prompt, response, history) of a list of {"role": …, "content": …}; all empty where it is null or [].

    The last answer is the response; with `keep_unlabelled` a dialogue may also end with the question.
    """
    if column not in row:
        raise _missing_column(name, number, column, row, flag)
    messages = row[column] or []
    where = f"{name} row {number}: column {column!r} ({flag})"
    if not isinstance(messages, list):
        raise ValueError(
            f"{where} must be a list of messages, such as "
            '[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}], '
            f"but is {_kind(messages)}"
        )
    turns, expected = [], ("system", "user")
    for position, message in enumerate(messages, start=1):
        place = f"{where}, turn {position}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = f"an object of {', '.join(message) or 'nothing'}" if isinstance(message, dict) else _kind(message)
            raise ValueError(f"{place}: expected an object of role and content, found {found}")
        role, content = message["role"], message["content"]
        if role not in expected:
            raise ValueError(
                f"{place}: the role is {_shown(str(role))!r}, expected {' or '.join(map(repr, expected))} here; after "
                "an optional system message, user and assistant take turns"
            )
        if not isinstance(content, str):
            raise ValueError(f"{place}: the content is {_kind(content)}, expected text")
        turns.append((role, _checked(content, f"{name} row {number}, turn {position}", column)))
        expected = ("assistant",) if role == "user" else ("user",)
    if not turns:
        return "", "", []
    if turns[-1][0] == "assistant":
        question, history = conversation(turns[:-1])
        return question, turns[-1][1], [list(turn) for turn in history]
    if not keep_unlabelled or turns[-1][0] != "user":
        raise ValueError(
            f"{where}, turn {len(turns)}: a dialogue ends with the answer to learn, of role 'assistant', but this one "
            f"ends with {turns[-1][0]!r}; add the answer or remove that turn"
        )
    question, history = conversation(turns)
    return question, "", [list(turn) for turn in history]


def _generate_examples(path, columns, place, max_samples, keep_unlabelled, key):
    """Every row of the file, those to be skipped marked; `key` only tells the cache of `datasets` files apart."""
    rows = read_rows(path)
    flags = {name: _flag(place, name) for name in COLUMNS}
    taken = {name: {columns[other] for other in COLUMNS if other != name} for name in COLUMNS}
    optional = ("query", "history", "response") if keep_unlabelled else ("query", "history")
    for name in optional:  # may be absent from a row, but not from all
        column = columns[name]
        if column and not columns["messages"] and not any(column in row for row in rows):
            raise _missing_column(path, 1, column, rows[0], flags[name], taken[name])
    kept = 0
    for number, row in enumerate(rows[:max_samples], start=1):
        if columns["messages"]:
            prompt, response, history = _dialogue(
                path, number, columns["messages"], row, flags["messages"], keep_unlabelled
            )
        else:
            prompt = _text(path, number, columns["prompt"], row, flags["prompt"], taken["prompt"])
            if columns["query"] in row and (query := _text(path, number, columns["query"], row, flags["query"])):
                prompt += "\n" + query
            if keep_unlabelled and columns["response"] not in row:
                response = ""
            else:
                response = _text(path, number, columns["response"], row, flags["response"], taken["response"])
            history = _history(path, number, columns["history"], row, flags["history"])
        skipped = not prompt.strip() or (not response.strip() and not keep_unlabelled)
        kept += not skipped
        yield {"prompt": prompt, "response": response, "history": history, "row": number, "skipped": skipped}
    if not kept:
        if columns["messages"]:
            names = ["messages"]
        else:
            names = ["prompt"] if keep_unlabelled else ["prompt", "response"]
        raise ValueError(
            f"{path} holds nothing to use: all {len(rows[:max_samples])} rows read have an empty "
            f"{' or '.join(repr(columns[name]) for name in names)}; check {' and '.join(flags[name] for name in names)}"
        )


def _code_sha256() -> str:
    """Digest of the files that turn bytes into ids, so that caches do not outlive a change of them."""
    names = ("data.py", "text.py", "tokenization_chatglm.py")
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in names)).hexdigest()


@contextlib.contextmanager
def _progress_bars(shown: bool):
    """Bars of `datasets` on or off inside the block, as before after it."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled_before = are_progress_bars_disabled()
    if not shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if not disabled_before:
            enable_progress_bars()


def load_examples(
    path: str | os.PathLike,
    prompt_column: str | None,
    response_column: str | None,
    history_column: str | None = None,
    max_samples: int | None = None,
    keep_unlabelled: bool = False,
    messages_column: str | None = None,
    query_column: str | None = None,
    place: str | None = None,
    overwrite_cache: bool = False,
    say=nobody,
):
    """The usable rows of a data file as (datasets.Dataset, number of rows skipped).

    Columns: `prompt` and `response` (text), `history` (list of [question, answer]), `row` (1-based, in the file).
    `messages_column` holds whole dialogues in place of the other columns, `query_column` text that is put behind the
    prompt, on a line of its own. Errors name columns by their flags, or by their entry in `place`.
    Of the first `max_samples` rows those with an empty prompt or response are skipped; with `keep_unlabelled`
    (prediction) an empty response is kept, a row may lack it, and `response_column` may be None. Cached by the file's content; `say` is
    told where the cache is damaged.
    ValueError naming file, row and column for a missing column, a wrong type or nothing to use.
    """
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    path = Path(path)
    content = hashlib.sha256(_read_bytes(path)).hexdigest()
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"{max_samples} samples of {path} were asked for; set 1 or more, or leave the flag out")
    features = Features(
        {
            "prompt": Value("string"),
            "response": Value("string"),
            "history": List(List(Value("string"))),
            "row": Value("int64"),
            "skipped": Value("bool"),
        }
    )
    columns = {
        "prompt": prompt_column,
        "query": query_column,
        "response": response_column,
        "history": history_column,
        "messages": messages_column,
    }
    settings = {
        "path": str(path),
        "columns": columns,
        "place": place,
        "max_samples": max_samples,
        "keep_unlabelled": keep_unlabelled,
        "key": f"{content} {_code_sha256()}",
    }

    def build(folder):
        with _progress_bars(False):
            return Dataset.from_generator(
                _generate_examples, features=features, gen_kwargs=settings, cache_dir=str(folder)
            )

    try:
        dataset = cached(json.dumps(settings), build, what=f"{path} is read", overwrite=overwrite_cache, say=say)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    kept = [index for index, skipped in enumerate(dataset["skipped"][:]) if not skipped]
    skipped = len(dataset) - len(kept)
    if skipped:
        dataset = dataset.select(kept)
    return dataset.remove_columns("skipped"), skipped


# ---- several data sets


def read_dataset_info(folder: str | os.PathLike, names: str) -> tuple[dict[str, dict], list[str]]:
    """({name: arguments of load_examples}, lines for the user) of data sets, `names` separated by commas.

    They are described in `dataset_info.json` in the folder, as ChatGLM-Efficient-Tuning has it. ValueError or
    FileNotFoundError for what that file lacks, or has wrong.
    """
    info_file = path_inside(folder, DATASET_INFO_FILE, "--dataset_dir")
    if not info_file.is_file():
        raise FileNotFoundError(
            f"{info_file} does not exist; it describes the data sets that --dataset may name, see docs/data.md"
        )
    check_size(info_file, MOST_JSON_BYTES)
    info = load_json(_read_bytes(info_file), str(info_file))
    if not isinstance(info, dict):
        raise ValueError(f"{info_file} is {_kind(info)}; expected an object that describes each data set by its name")
    sources, notes = {}, []
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name in sources:
            raise ValueError(f"--dataset {names} names {name!r} twice")
        if name not in info:
            near = difflib.get_close_matches(name, list(info), n=1)
            hint = f"; did you mean {as_typed(near[0])}?" if near else ""
            described = ", ".join(map(as_typed, info)) or "nothing"
            raise ValueError(f"{info_file} does not describe {name!r}, only {described}{hint}")
        sources[name], note = _described_source(Path(folder), info[name], f"{name!r} in {info_file}")
        notes += note
    if not sources:
        described = ", ".join(map(as_typed, info)) or "none"
        raise ValueError(f"--dataset {names!r} names no data set; {info_file} describes {described}")
    return sources, notes


def _described_source(folder, entry, place):
    """(arguments of load_examples, lines for the user) of one entry of a dataset_info.json."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {_kind(entry)}; expected an object with file_name")
    file_name, columns = entry.get("file_name"), entry.get("columns") or ALPACA_COLUMNS
    if not isinstance(file_name, str):
        online = next((key for key in ("hf_hub_url", "script_url") if key in entry), None)
        reason = f"is fetched by {online}, which is not done here: download it and" if online else "has no file:"
        raise ValueError(f"{place} {reason} give the file's name as file_name")
    if not isinstance(columns, dict):
        raise ValueError(f'"columns" of {place} is {_kind(columns)}; expected an object such as {ALPACA_COLUMNS}')
    for key, column in columns.items():
        if key not in COLUMNS or not isinstance(column, str | None):
            found = f"{key!r}" if key not in COLUMNS else f"{_kind(column)} for {key!r}"
            raise ValueError(f'"columns" of {place} has {found}; expected names of columns for {", ".join(COLUMNS)}')
    path, notes = path_inside(folder, file_name, f"file_name of {place}"), []
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, the file of {place}; correct file_name, or put the file there")
    if wanted := entry.get("file_sha1"):
        found = hashlib.sha1(_read_bytes(path)).hexdigest()
        if found != str(wanted).lower():
            notes.append(
                f"{path} is not the file that {place} describes: its SHA-1 is {found}, expected {wanted}. "
                "It is used as it is; correct file_sha1 if you changed the file."
            )
    source = {"path": path, "place": place}
    source.update((f"{name}_column", columns.get(name) or None) for name in COLUMNS)
    if not source["messages_column"] and columns is ALPACA_COLUMNS:
        rows = read_rows(path)  # the second line of an instruction is left out by many files
        if not any(ALPACA_COLUMNS["query"] in row for row in rows):
            source["query_column"] = None
    return source, notes


def draw_shares(datasets: dict, ratios: list[float] | None, seed: int) -> dict:
    """{name: dataset} with as many rows of each as its ratio allows.

    A ratio is a share of the rows of all together. Rows are drawn without repetition, until the data set that runs
    out first is used up; their order stays. Without ratios all rows of all data sets are used.
    """
    if not ratios:
        return datasets
    total = min(len(dataset) * sum(ratios) / ratio for dataset, ratio in zip(datasets.values(), ratios, strict=True))
    drawn = {}
    for (name, dataset), ratio in zip(datasets.items(), ratios, strict=True):
        count = min(len(dataset), max(1, round(total * ratio / sum(ratios))))
        # By name, so that another data set beside it changes nothing but the number of rows.
        drawn[name] = dataset.select(sorted(random.Random(f"{seed} {name}").sample(range(len(dataset)), count)))
    return drawn


def hold_out(dataset, share: float, seed: int):
    """(training rows, dev rows): the same share of every data set at random, at least one row and not all."""
    count = min(len(dataset) - 1, max(1, round(share * len(dataset))))
    chosen = set(random.Random(f"{seed} dev").sample(range(len(dataset)), count))
    rest = [index for index in range(len(dataset)) if index not in chosen]
    return dataset.select(rest), dataset.select(sorted(chosen))


def join(datasets):
    """One dataset of the rows of several, in order."""
    from datasets import concatenate_datasets

    datasets = list(datasets)
    return datasets[0] if len(datasets) == 1 else concatenate_datasets(datasets)


# ---- examples -> token ids and labels


def check_lengths(tokenizer, source_prefix: str, max_source_length: int, max_target_length: int) -> None:
    """ValueError when prompts or responses would be cut to nothing."""
    fixed = tokenizer.encode_batch([source_prefix + tokenizer.build_prompt("")])[0]
    minimum = len(tokenizer.prefix_tokens) + len(fixed)
    if max_source_length < minimum:
        raise ValueError(
            f"--max_source_length {max_source_length} cannot hold the fixed part of every prompt, {minimum} tokens "
            f"of {_shown(source_prefix + tokenizer.build_prompt('…'))!r}; set at least {minimum} plus your questions"
        )
    if max_target_length < 1:
        raise ValueError(f"--max_target_length {max_target_length} leaves no token of the response; set 1 or more")


def _cut_question(tokenizer, question: str, limit: int, source_prefix: str) -> list[int]:
    """Ids of the prompt of a question alone, which loses its end and keeps the answer marker behind it."""

    def encode(length):
        return tokenizer.fit_prompt(question[:length], [], limit, source_prefix)[0]

    # check_lengths has made sure that the empty question fits.
    return encode(bisect_left(range(1, len(question) + 1), True, key=lambda length: len(encode(length)) > limit))


def _encode_sources(examples, tokenizer, source_prefix, max_source_length):
    """Ids of each prompt within `max_source_length`, special tokens included, its length before cutting, and the
    number of turns it lost.

    A prompt without a history loses its end, the answer marker included, as in the official script.
    """
    prompts = [
        source_prefix + tokenizer.build_prompt(prompt, history)
        for prompt, history in zip(examples["prompt"], examples["history"], strict=True)
    ]
    sources, lengths, dropped_turns = [], [], []
    for index, ids in enumerate(tokenizer.encode_batch(prompts)):
        source, dropped = tokenizer.prefix_tokens + ids, 0
        lengths.append(len(source))
        if len(source) > max_source_length and (history := examples["history"][index]):
            question = examples["prompt"][index]
            source, dropped = tokenizer.fit_prompt(question, history, max_source_length, source_prefix)
            if len(source) > max_source_length:
                source = _cut_question(tokenizer, question, max_source_length, source_prefix)
        sources.append(source[:max_source_length])
        dropped_turns.append(dropped)
    return sources, lengths, dropped_turns


def _encode_training_batch(
    examples, tokenizer, source_prefix, max_source_length, max_target_length, ignore_pad_token_for_loss
):
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ignored = IGNORED_LABEL if ignore_pad_token_for_loss else pad
    sources, source_lengths, dropped_turns = _encode_sources(examples, tokenizer, source_prefix, max_source_length)
    targets = tokenizer.encode_batch(examples["response"])
    features = {
        "input_ids": [],
        "labels": [],
        "source_length": source_lengths,
        "target_length": [len(target) for target in targets],
        "length": [],
        "dropped_turns": dropped_turns,
        "row": examples["row"],
    }
    for source, target, row in zip(sources, targets, examples["row"], strict=True):
        answer = learned = target[:max_target_length] + [end]
        features["input_ids"].append(source + answer)
        features["length"].append(len(source) + len(answer))
        # The pad token is also the unknown token; as in the official script it teaches nothing in an answer either.
        if pad in answer:
            learned = [ignored if index == pad else index for index in answer]
            if not any_supervised([ignored, *learned]):
                raise ValueError(
                    f"row {row} has nothing to learn: every token of its response, the end included, is the padding or "
                    f"unknown token (id {pad}). Leave the row out, or check tokenizer.model and eos_token_id"
                )
        features["labels"].append([ignored] * len(source) + learned)
    return features


def any_supervised(labels: list[int]) -> bool:
    """Whether a row teaches something; its first token is predicted from nothing and never counts."""
    return labels[1:].count(IGNORED_LABEL) < len(labels) - 1


def _encode_prediction_batch(examples, tokenizer, source_prefix, max_source_length, max_target_length):
    sources, _, dropped_turns = _encode_sources(examples, tokenizer, source_prefix, max_source_length)
    labels = tokenizer.encode_batch(examples["response"])
    room = max(0, max_target_length - len(tokenizer.prefix_tokens))
    return {
        "input_ids": sources,
        "labels": [tokenizer.prefix_tokens + ids[:room] for ids in labels],
        "row": examples["row"],
        "dropped_turns": dropped_turns,
    }


def _encode(dataset, encode_batch, columns, tokenizer, num_workers, overwrite_cache, say, settings):
    """`encode_batch` mapped over the dataset, cached by rows, vocabulary, settings and code.

    `columns`: what it returns beside the lists `input_ids` and `labels`.
    """
    from datasets import Features, List, Value

    # Named, because to find out the types of lists datasets looks at each of their numbers.
    features = {
        **dict.fromkeys(("input_ids", "labels"), List(Value("int32"))),
        **dict.fromkeys(columns, Value("int64")),
    }
    # datasets' own fingerprint would name functions of this file, not notice a change in them.
    key = json.dumps([dataset._fingerprint, encode_batch.__name__, tokenizer.model_sha256, _code_sha256(), settings])
    workers = max(1, min(num_workers or 1, len(dataset) // ROWS_PER_WORKER, os.cpu_count() or 1))

    def build(folder):
        with _progress_bars(len(dataset) >= ROWS_WORTH_A_PROGRESS_BAR):
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
    source_prefix: str = "",
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
    say=nobody,
):
    """Dataset of `input_ids` = prompt + response + end, and `labels`, which are ignored over the prompt.

    The prompt is cut on the right to `max_source_length` tokens, `[gMASK] sop` included, the response to
    `max_target_length` before its end token. A prompt with a history loses its oldest turns instead (their number
    is `dropped_turns`), then the end of its question. No padding. `source_length` and `target_length` are the token
    counts before cutting, `row` the number in the file. Ignored labels are -100, or the pad token without
    `ignore_pad_token_for_loss`. Raises ValueError for a row without a single supervised token.
    """
    check_lengths(tokenizer, source_prefix, max_source_length, max_target_length)
    settings = {
        "source_prefix": source_prefix,
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
        "ignore_pad_token_for_loss": ignore_pad_token_for_loss,
    }
    columns = ("source_length", "target_length", "length", "dropped_turns", "row")
    return _encode(dataset, _encode_training_batch, columns, tokenizer, num_workers, overwrite_cache, say, settings)


def encode_prediction(
    dataset,
    tokenizer,
    *,
    source_prefix: str = "",
    max_source_length: int,
    max_target_length: int,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
    say=nobody,
):
    """Dataset of `input_ids` = the prompt alone, `labels` = the reference response, `row` and `dropped_turns`.

    As in the official script the labels start with `[gMASK] sop`, which count among `max_target_length`.
    """
    check_lengths(tokenizer, source_prefix, max_source_length, max_target_length)
    settings = {
        "source_prefix": source_prefix,
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
    }
    columns = ("row", "dropped_turns")
    return _encode(dataset, _encode_prediction_batch, columns, tokenizer, num_workers, overwrite_cache, say, settings)


def digest(dataset) -> str:
    """Names the token ids of an encoded dataset and their order, whatever file they came from."""
    sha256 = hashlib.sha256()
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        for ids in batch["input_ids"].chunks:
            sha256.update(ids.value_lengths().to_numpy().tobytes())
            sha256.update(ids.flatten().to_numpy().tobytes())
    return sha256.hexdigest()[:16]


# ---- rows -> the order in which they are read


class RowOrder:
    """The rows of an epoch in random order, those of a step then grouped by length; a sampler for a DataLoader.

    `batches_per_step` batches of `batch_size` rows, those of all processes and accumulated ones, make a step. It gets
    the rows that plain random sampling with this seed gives it, so its gradient is the same; but rows of one batch are
    of like length, and so are the batches that `num_processes` processes compute at the same time. With `window` > 1
    rows are grouped within so many steps, which then differ in length; the batches of a window come in random order.

    `epoch()` is asked at the start of every pass. Every process must read the same order and keep every
    `num_processes`-th batch.
    """

    def __init__(self, lengths, *, batch_size, batches_per_step, num_processes=1, seed=0, epoch=lambda: 0, window=1):
        self.lengths = lengths
        self.together = batch_size * num_processes
        self.rows_per_window = batch_size * batches_per_step * window
        self.seed = seed
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        import torch

        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.rows_per_window):
            rows = sorted(order[start : start + self.rows_per_window], key=self.lengths.__getitem__)
            groups = [rows[first : first + self.together] for first in range(0, len(rows), self.together)]
            whole = len(rows) // self.together  # an incomplete group stays last, or batches would straddle groups
            for group in [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(groups))]:
                yield from groups[group]


# ---- features -> batches


def _pad(sequences: list[list[int]], value: int, length: int, left: bool = False):
    """int64 tensor (B, length)."""
    import torch

    padding = [[value] * (length - len(sequence)) for sequence in sequences]
    pairs = zip(padding, sequences, strict=True) if left else zip(sequences, padding, strict=True)
    return torch.tensor([first + second for first, second in pairs], dtype=torch.int64)


def collate_training(
    features, *, pad_token_id: int, label_pad_id: int = IGNORED_LABEL, multiple_of: int = 8, min_length: int = 0
):
    """`input_ids` and `labels`, int64 (B, S), padded on the right; S is the longest row, rounded up. `row` (B,).

    S is at least `min_length`.

    There is no attention mask: under causal attention no token sees the padding to its right. Nothing is supervised
    in a blank row, see WithBlankRow.
    Raises ValueError naming the rows where none has a supervised token: their mean loss would be 0 / 0.
    """
    import torch

    rows = [feature["row"] for feature in features]
    blank = torch.tensor([row == BLANK_ROW["row"] for row in rows])
    if not blank.all() and not any(any_supervised(feature["labels"]) for feature in features):
        raise ValueError(f"row {shown_rows(rows)}: a batch without a single supervised token, nothing to learn from")
    longest = max(len(feature["input_ids"]) for feature in features)
    length = max(min_length, -(-longest // multiple_of) * multiple_of)
    labels = _pad([feature["labels"] for feature in features], label_pad_id, length)
    return {
        "input_ids": _pad([feature["input_ids"] for feature in features], pad_token_id, length),
        "labels": labels.masked_fill(blank[:, None], IGNORED_LABEL),
        "row": torch.tensor(rows, dtype=torch.int64),  # for messages; the trainer takes it out
    }


# Stands for no row of the file: one token that is neither learned nor counted.
BLANK_ROW = {"input_ids": [0], "labels": [IGNORED_LABEL], "row": 0}


class WithBlankRow:
    """A dataset that has a blank row behind its last one, at index len(), and does not count it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return BLANK_ROW if index == len(self) else self.dataset[index]


class EvenBatches:
    """The batches of `batch_sampler`, filled up with blank rows to equally many full ones for every process.

    Otherwise accelerate fills them up with rows from the start of the epoch, which would count twice.
    """

    def __init__(self, batch_sampler, num_processes: int, blank: int):
        self.batch_sampler, self.num_processes, self.blank = batch_sampler, num_processes, blank
        self.sampler, self.batch_size, self.drop_last = batch_sampler.sampler, batch_sampler.batch_size, False

    def __len__(self):
        return -(-len(self.batch_sampler) // self.num_processes) * self.num_processes

    def __iter__(self):
        for batch in self.batch_sampler:
            yield batch + [self.blank] * (self.batch_size - len(batch))
        for _ in range(len(self) - len(self.batch_sampler)):
            yield [self.blank] * self.batch_size


def number_rows(dataset, position: int):
    """The dataset, its row numbers saying that it is data set number `position` of several; for shown_rows."""
    numbers = [position * ROWS_OF_A_DATASET + row for row in dataset["row"]]
    return dataset.remove_columns("row").add_column("row", numbers)


def shown_rows(rows: list[int], limit: int = 32) -> str:
    """Row numbers for a message: "3, 17, 40", cut after `limit`; of several data sets "3 of data set 2"."""
    numbers = []
    for position, row in (divmod(row, ROWS_OF_A_DATASET) for row in sorted(rows)[:limit]):
        numbers.append(f"{row} of data set {position}" if position else str(row))
    return ", ".join(numbers) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")


def collate_prediction(features, *, pad_token_id: int):
    """`input_ids`, `attention_mask`, `position_ids`, int64 (B, S), padded on the left, and `labels` on the right.

    Position ids count from 0 at the first token and are 0 at padding; labels are padded with -100.
    """
    prompts = [feature["input_ids"] for feature in features]
    labels = [feature["labels"] for feature in features]
    length = max(map(len, prompts))
    return {
        "input_ids": _pad(prompts, pad_token_id, length, left=True),
        "attention_mask": _pad([[1] * len(prompt) for prompt in prompts], 0, length, left=True),
        "position_ids": _pad([list(range(len(prompt))) for prompt in prompts], 0, length, left=True),
        "labels": _pad(labels, IGNORED_LABEL, max(map(len, labels))),
    }


# ---- what the user should see before the first step


def _length_line(name: str, lengths, limit: int) -> str:
    import numpy

    lengths = numpy.asarray(lengths)
    figures = [int(numpy.percentile(lengths, share, method="higher")) for share in (50, 90, 99)]
    columns = [*figures, int(lengths.max()), limit]
    return f"  {name:<10}" + "".join(f"{figure:>8,}" for figure in columns) + f"{(lengths > limit).mean():>10.1%}"


def describe_training(
    dataset, tokenizer, *, skipped: int, max_source_length: int, max_target_length: int, marked="what the model learns"
) -> str:
    """Text about an encode_training dataset: rows, token lengths, shares cut, and its first example decoded.

    ⟦ and ⟧ enclose the part of the example that the model learns, called `marked`.
    """
    source_lengths, target_lengths = dataset["source_length"][:], dataset["target_length"][:]
    lines = [
        f"{len(dataset) + skipped:,} rows read, {skipped:,} skipped (empty prompt or response), {len(dataset):,} used",
        f"  {'tokens':<10}" + "".join(f"{name:>8}" for name in ("50%", "90%", "99%", "max", "limit")) + "   cut off",
        _length_line("prompt", source_lengths, max_source_length),
        _length_line("response", target_lengths, max_target_length),
    ]
    shortened = [turns > 0 for turns in dataset["dropped_turns"][:]]
    cut = [length > max_source_length and not fits for length, fits in zip(source_lengths, shortened, strict=True)]
    for what, rows, flag, limit in (
        ("prompts lose their end", cut, "--max_source_length", max_source_length),
        ("prompts lose their oldest turns", shortened, "--max_source_length", max_source_length),
        (
            "responses lose their end",
            [length > max_target_length for length in target_lengths],
            "--max_target_length",
            max_target_length,
        ),
    ):
        if (share := sum(rows) / len(rows)) > 0.01:
            kept = "them" if what.endswith("turns") else "it"
            lines.append(f"{share:.0%} of the {what} at {limit} tokens; raise {flag} to keep {kept}.")
    example = dataset[0]
    start = len(example["input_ids"]) - min(example["target_length"], max_target_length) - 1
    prompt = tokenizer.decode(example["input_ids"][:start])
    answer = tokenizer.decode(example["input_ids"][start:])
    lines += [
        f"The first example, with {marked} between ⟦ and ⟧:",
        f"[gMASK] sop {_shown(prompt, 400)}⟦{_shown(answer, 400)} {tokenizer.eos_token}⟧",
    ]
    return "\n".join(lines)
