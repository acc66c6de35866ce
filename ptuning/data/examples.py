"""Rows -> examples of prompt, response and history.

Answers to the loading of data files in the official `main.py`. It differs in that every defect is one error that names
file, row and column, and that rows without a prompt or response are counted.
"""

import contextlib
import difflib
import hashlib
import json
import os
from pathlib import Path

from chatglm2.conversation import conversation
from chatglm3.conversation import TOOL_PROMPT, read_message, read_used_tool
from common.messages import cut_short, silent
from common.quoting import as_typed, flag_as_typed
from data.cache import cached
from data.rows import glance, kind_of_value, read_data, read_rows

OF_ROLES = ("role", "metadata")  # columns of examples whose prompts have roles: of the prompt, of the response
TOOLS = "tools"  # a column beside messages
COLUMNS = ("prompt", "query", "response", "history", "messages")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROWS_WORTH_A_PROGRESS_BAR = 20_000


def flag_of(place: str | None, column: str) -> str:
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
        remedy = "put the value in double quotes or name another column"
        if isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value):
            remedy = "a pair of answers is for --stage rm or dpo"
        raise ValueError(
            f"{name} row {number}: column {column!r} ({flag}) holds {kind_of_value(value)}, expected text; {remedy}"
        )
    return checked(value, f"{name} row {number}", column)


def checked(text: str, where: str, column: str) -> str:
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
        raise ValueError(f'{expected} of text, such as [["你好", "你好！"]], but is {kind_of_value(history)}')
    for position, turn in enumerate(history, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            found = f"a list of {len(turn)}" if isinstance(turn, list) else kind_of_value(turn)
            raise ValueError(f"{expected}, but its item {position} is {found}")
        for text in turn:
            if not isinstance(text, str):
                raise ValueError(f"{expected} of text, but its item {position} contains {kind_of_value(text)}")
            checked(text, f"{name} row {number}", column)
    return history


def _messages_in(name: str, number: int, column: str, row: dict, flag: str) -> tuple[str, list]:
    """(where they are, in words; the messages of a row), those that ShareGPT names with role and content; [] for null."""
    if column not in row:
        raise _missing_column(name, number, column, row, flag)
    messages = row[column] or []
    where = f"{name} row {number}: column {column!r} ({flag})"
    if not isinstance(messages, list):
        raise ValueError(
            f"{where} must be a list of messages, such as "
            '[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}], '
            f"but is {kind_of_value(messages)}"
        )
    return where, [
        {"role": SHAREGPT_ROLES.get(str(message["from"]), message["from"]), "content": message["value"]}
        if isinstance(message, dict) and message.keys() >= {"from", "value"}
        else message
        for message in messages
    ]


def _dialogue(
    name: str, number: int, column: str, row: dict, flag: str, keep_unlabelled: bool
) -> tuple[str, str, list]:
    """(prompt, response, history) of a list of {"role": …, "content": …}; all empty where it is null or [].

    The last answer is the response; with `keep_unlabelled` a dialogue may also end with the question.
    """
    where, messages = _messages_in(name, number, column, row, flag)
    turns, expected = [], ("system", "user")
    for position, message in enumerate(messages, start=1):
        place = f"{where}, turn {position}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            is_object = isinstance(message, dict)
            found = f"an object of {', '.join(message) or 'nothing'}" if is_object else kind_of_value(message)
            raise ValueError(f"{place}: expected an object of role and content, found {found}")
        role, content = message["role"], message["content"]
        if role not in expected:
            raise ValueError(
                f"{place}: the role is {cut_short(str(role))!r}, expected {' or '.join(map(repr, expected))} here; after "
                "an optional system message, user and assistant take turns"
            )
        if not isinstance(content, str):
            raise ValueError(f"{place}: the content is {kind_of_value(content)}, expected text")
        turns.append((role, checked(content, f"{name} row {number}, turn {position}", column)))
        expected = ("assistant",) if role == "user" else ("user",)
    if not turns:
        return "", "", []
    answer = turns.pop()[1] if turns[-1][0] == "assistant" else None
    if answer is None and not (keep_unlabelled and turns[-1][0] == "user"):
        raise ValueError(
            f"{where}, turn {len(turns)}: a dialogue ends with the answer to learn, of role 'assistant', but this one "
            f"ends with {turns[-1][0]!r}; add the answer or remove that turn"
        )
    question, history = conversation(turns)
    return question, answer or "", [list(turn) for turn in history]


def _roles_of(name: str, number: int, column: str, row: dict, flag: str, keep_unlabelled: bool) -> tuple:
    """(prompt, response, history, role of the prompt, metadata of the response) of messages, for a prompt of roles.

    The history are lists of role, metadata and content. Empty, and with errors, as _dialogue.
    """
    where, found = _messages_in(name, number, column, row, flag)
    messages = []
    for position, message in enumerate(found, start=1):
        place = f"{where}, turn {position}"
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"{place}: expected an object of role and content, found {kind_of_value(message)}")
        for each in read_used_tool(message, place) if "observation" in message else [message]:
            texts = read_message(each, place)
            messages.append([checked(text, f"{name} row {number}, turn {position}", column) for text in texts])
    if row.get(TOOLS) and messages:  # beside the messages, as in the data of ChatGLM3's own fine-tuning
        messages.insert(0, list(read_message({**TOOL_PROMPT, "tools": row[TOOLS]}, f"{name} row {number}")))
    if not messages:
        return "", "", [], "user", ""
    answer = messages.pop() if messages[-1][0] == "assistant" else None
    if answer is None and not keep_unlabelled:
        raise ValueError(
            f"{where}, turn {len(found)}: a dialogue ends with the answer to learn, of role 'assistant', but this one "
            f"ends with {messages[-1][0]!r}; add the answer or remove that turn"
        )
    if not messages:
        raise ValueError(f"{where}: there is only an answer; put the message that it answers before it")
    _, metadata, response = answer or ("", "", "")
    role, _, prompt = messages.pop()
    return prompt, response, messages, role, metadata


def _parts_of(row, number, path, columns, flags, taken, keep_unlabelled, query_separator="\n", keep_roles=False):
    """(prompt, response, history) of a row; ValueError where its columns are not as they should be.

    With `keep_roles` two more, as _roles_of gives them.
    """
    if keep_roles and columns["messages"]:
        return _roles_of(path, number, columns["messages"], row, flags["messages"], keep_unlabelled)
    if keep_roles:
        plain = _parts_of(row, number, path, columns, flags, taken, keep_unlabelled, query_separator)
        return *plain, "user", ""
    if columns["messages"]:
        return _dialogue(path, number, columns["messages"], row, flags["messages"], keep_unlabelled)
    prompt = _text(path, number, columns["prompt"], row, flags["prompt"], taken["prompt"])
    if columns["query"] in row and (query := _text(path, number, columns["query"], row, flags["query"])):
        prompt += query_separator + query
    response = ""
    if not keep_unlabelled or columns["response"] in row:
        response = _text(path, number, columns["response"], row, flags["response"], taken["response"])
    return prompt, response, _history(path, number, columns["history"], row, flags["history"])


def _names_of(columns, place=None):
    """({column: its flag}, {column: the names that the others have})."""
    flags = {name: flag_of(place, name) for name in COLUMNS}
    return flags, {name: {columns[other] for other in COLUMNS if other != name} for name in COLUMNS}


def look_at_file(path: str | os.PathLike, columns: dict, keep_unlabelled: bool, keep_roles=False) -> int | None:
    """The number of rows in a data file, None where counting takes long. ValueError where its first row is faulty.

    `columns` are {column: its name}. Where a checkpoint may yet name some of them, no row is looked at.
    """
    row, count = glance(path)
    known = columns["messages"] or (columns["prompt"] and (keep_unlabelled or columns["response"]))
    if row is not None and known:
        _parts_of(row, 1, path, columns, *_names_of(columns), keep_unlabelled, keep_roles=keep_roles)
    return count


def _generate_examples(path, columns, query_separator, place, max_samples, keep_unlabelled, key, keep_roles=False):
    """Every row of the file, those to be skipped marked; `key` only tells the cache of `datasets` files apart."""
    rows = read_rows(path)
    flags, taken = _names_of(columns, place)
    optional = ("query", "history", "response") if keep_unlabelled else ("query", "history")
    for name in optional:  # may be absent from a row, but not from all
        column = columns[name]
        if column and not columns["messages"] and not any(column in row for row in rows):
            raise _missing_column(path, 1, column, rows[0], flags[name], taken[name])
    kept = 0
    for number, row in enumerate(rows[:max_samples], start=1):
        prompt, response, history, *others = _parts_of(
            row, number, path, columns, flags, taken, keep_unlabelled, query_separator, keep_roles
        )
        skipped = not prompt.strip() or (not response.strip() and not keep_unlabelled)
        kept += not skipped
        example = {"prompt": prompt, "response": response, "history": history, "row": number, "skipped": skipped}
        yield {**example, **dict(zip(OF_ROLES, others, strict=False))}
    if not kept:
        names = ["messages"] if columns["messages"] else ["prompt"] if keep_unlabelled else ["prompt", "response"]
        raise ValueError(
            f"{path} holds nothing to use: all {len(rows[:max_samples])} rows read have an empty "
            f"{' or '.join(repr(columns[name]) for name in names)}; check {' and '.join(flags[name] for name in names)}"
        )


def code_sha256() -> str:
    """Digest of the files that turn bytes into ids, so that caches do not outlive a change of them."""
    rooms = Path(__file__).parents[1]
    models = ("tokenization_chatglm.py", "conversation.py")
    others = [file for name in models for file in sorted(rooms.glob(f"chatglm*/{name}"))]
    files = [*sorted((rooms / "data").glob("*.py")), rooms / "common/text.py", *others]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextlib.contextmanager
def progress_bars(shown: bool):
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


def read_once(path, generate, features: dict, settings: dict, overwrite_cache=False, say=silent):
    """The rows that `generate` makes of a data file as a datasets.Dataset, cached by the file's content.

    `features` are {column: its type}; a `history` is there, too. `settings` are the arguments of `generate`, a `key`
    aside, which only tells the cache of `datasets` files apart; `say` is told where the cache is damaged.
    """
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    content, count = hashlib.sha256(read_data(Path(path))).hexdigest(), settings["max_samples"]
    if count is not None and count < 1:
        raise ValueError(f"{count} samples of {path} were asked for; set 1 or more, or leave the flag out")
    features = Features(
        {"history": List(List(Value("string"))), **{name: Value(kind) for name, kind in features.items()}}
    )
    settings = {**settings, "key": f"{content} {code_sha256()}"}

    def build(folder):
        with progress_bars(False):
            return Dataset.from_generator(generate, features=features, gen_kwargs=settings, cache_dir=str(folder))

    key = json.dumps([generate.__name__, settings])
    try:
        return cached(key, build, what=f"{path} is read", overwrite=overwrite_cache, say=say)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def without_skipped(dataset):
    """(the rows that are not marked as `skipped`, how many are)."""
    kept = [index for index, skipped in enumerate(dataset["skipped"][:]) if not skipped]
    skipped = len(dataset) - len(kept)
    if skipped:
        dataset = dataset.select(kept)
    return dataset.remove_columns("skipped"), skipped


def load_examples(
    path: str | os.PathLike,
    prompt_column: str | None,
    response_column: str | None,
    history_column: str | None = None,
    max_samples: int | None = None,
    keep_unlabelled: bool = False,
    messages_column: str | None = None,
    query_column: str | None = None,
    query_separator: str = "\n",
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    place: str | None = None,
    overwrite_cache: bool = False,
    keep_roles: bool = False,
    say=silent,
):
    """The usable rows of a data file as (datasets.Dataset, number of rows skipped).

    Columns: `prompt` and `response` (text), `history` (list of [question, answer]), `row` (1-based, in the file).
    `messages_column` holds whole dialogues in place of the other columns, `query_column` text that is put behind the
    prompt and `query_separator`. Pairs of answers, with a `chosen_column` and a `rejected_column`, are
    refused. Errors name columns by their flags, or by their entry in `place`.
    Of the first `max_samples` rows those with an empty prompt or response are skipped; with `keep_unlabelled`
    (prediction) an empty response is kept, a row may lack it, and `response_column` may be None. Cached by the file's
    content; `say` is told where the cache is damaged. With `keep_roles`, for prompts of roles, a `history` may hold lists of
    role, metadata and content, and the columns OF_ROLES are there.
    ValueError naming file, row and column for a missing column, a wrong type or nothing to use.
    """
    if chosen_column or rejected_column:
        raise ValueError(
            f"{place} has pairs of answers, which --stage rm and dpo learn from. To learn the better one as the answer, give "
            f'"response": {json.dumps(chosen_column, ensure_ascii=False)} in place of "chosen" and "rejected"'
        )
    features = {"prompt": "string", "response": "string", "row": "int64", "skipped": "bool"}
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
        "query_separator": query_separator,
        "place": place,
        "max_samples": max_samples,
        "keep_unlabelled": keep_unlabelled,
    }
    if keep_roles:
        features |= dict.fromkeys(OF_ROLES, "string")
        settings["keep_roles"] = True
    dataset = read_once(path, _generate_examples, features, settings, overwrite_cache, say)
    return without_skipped(dataset)
