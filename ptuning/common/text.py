"""Bytes -> text -> JSON or YAML, for files that a user writes.

Answers to nothing in the official scripts, which read UTF-8 only, and of a key that stands twice the last value.
"""

import json
import re
from json.decoder import JSONObject
from json.scanner import py_make_scanner

# Encodings in which a stray byte is noticed; what cchardet says of others counts only after GB18030 failed.
EAST_ASIAN_ENCODINGS = {"BIG5", "SHIFT_JIS", "EUC-JP", "EUC-KR", "UHC", "EUC-TW"}
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark starts with that of UTF-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


# ---- bytes -> text


def _decode_strictly(data: bytes, encoding: str) -> str | None:
    """The text, None where it is none or has a character below the space that no text file has."""
    try:
        text = data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None
    found = set(text.encode("utf-8", "ignore"))
    return None if any(code < 32 and chr(code) not in "\t\n\v\f\r\x1a" for code in found) else text


def _decode_wide(data: bytes) -> str | None:
    """Text in UTF-16 or UTF-32 without a byte-order mark, told by where the zero bytes of ASCII lie."""
    width = 32 if 2 * data.count(0) > len(data) else 16
    for order in ("le", "be"):
        text = _decode_strictly(data, f"utf-{width}-{order}")
        # In the wrong byte order, or in another encoding, no line end, bracket or comma comes out.
        if text is not None and any(character in text for character in "\n{[,"):
            return text
    return None


def _is_damaged_utf8(data: bytes) -> bool:
    """True when nearly all characters beyond ASCII are sound UTF-8, so that no other encoding is likely."""
    text = data.decode("utf-8", errors="replace")
    damaged = text.count("\ufffd")
    return sum(character > "\x7f" for character in text) - damaged > 4 * damaged


def decode_text(data: bytes, name: str) -> str:
    """Text of a file, its encoding detected: byte-order mark, UTF-8, UTF-16 / 32, then by cchardet or GB18030.

    ValueError naming line and byte offset for bytes that are no text.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            text = _decode_strictly(data, encoding)
            if text is None:
                raise ValueError(
                    f"{name} starts with the byte-order mark of {encoding.upper()} but is not {encoding.upper()} "
                    "throughout; save it again as UTF-8"
                )
            return text
    if b"\0" in data and (text := _decode_wide(data)) is not None:
        return text
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start
    else:
        if "\0" not in text:
            return text
        offset = data.index(0)
    line = data.count(b"\n", 0, offset) + 1
    where = f"{name} line {line}, byte {offset} (0x{data[offset]:02x})"
    if b"\0" not in data:
        if _is_damaged_utf8(data):
            raise ValueError(f"{where} is not UTF-8, though the rest is; repair that line, or save the file as UTF-8")

        import cchardet

        guess = cchardet.detect(data)
        candidates = ["gb18030", guess["encoding"]]  # GB18030 contains GBK and GB2312
        # cchardet takes very short texts in GB18030 for Cyrillic or, with little confidence, for Big5.
        if guess["encoding"] in EAST_ASIAN_ENCODINGS and guess["confidence"] >= 0.6:
            candidates.reverse()
        for encoding in filter(None, candidates):
            if (text := _decode_strictly(data, encoding)) is not None:
                return text
    raise ValueError(f"{where} is no text in UTF-8, UTF-16 or GB18030; is this the right file? Save it as UTF-8")


# ---- text -> JSON


class DuplicateKey(json.JSONDecodeError):
    """A key stands twice in one object, which begins at `pos`, in item `element` (from 1) if the text is an array."""

    def __init__(self, key: str, text: str, pos: int, element: int | None):
        super().__init__(f"the key {key!r} stands twice in one object", text, pos)
        self.key, self.element = key, element


class _FoundTwice(Exception):
    pos = None  # of the object, once it is known


def _object_of(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        raise _FoundTwice(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found


BETWEEN = re.compile(r"[ \t\r\n,]*")  # the elements of an array
UNIQUE = json.JSONDecoder(object_pairs_hook=_object_of)


def _object_with_place(text_and_start: tuple[str, int], *settings):
    try:
        return JSONObject(text_and_start, *settings)
    except _FoundTwice as error:
        if error.pos is None:  # else it is an object inside this one
            error.pos = text_and_start[1] - 1
        raise


def _locate_duplicate(text: str, key: str) -> DuplicateKey:
    """The error for a text that UNIQUE has refused: only Python's own scanner, which is slow, tells where."""
    start, element = BETWEEN.match(text).end(), None
    if text[start] == "[":
        element, start = 1, start + 1
        while True:
            start = BETWEEN.match(text, start).end()
            try:
                _, start = UNIQUE.raw_decode(text, start)
            except _FoundTwice:
                break
            element += 1
    scanner = json.JSONDecoder(object_pairs_hook=_object_of)
    scanner.parse_object = _object_with_place
    scanner.scan_once = py_make_scanner(scanner)
    try:
        scanner.raw_decode(text, start)
    except _FoundTwice as error:
        start = error.pos
    except RecursionError:  # nested deeper than that scanner can go
        pass
    return DuplicateKey(key, text, start, element)


def parse_json(text: str, unique_keys: bool = False):
    """json.loads, with every failure a JSONDecodeError; with `unique_keys` a DuplicateKey is one."""
    if text.startswith("\ufeff"):  # json.loads alone looks for it
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    try:
        return UNIQUE.decode(text) if unique_keys else json.loads(text)
    except json.JSONDecodeError:
        raise
    except _FoundTwice as error:
        raise _locate_duplicate(text, error.args[0]) from None
    except RecursionError:
        raise json.JSONDecodeError("brackets are nested too deep", text, 0) from None
    except ValueError:  # Python reads no integers of more than 4,300 digits
        raise json.JSONDecodeError("a number has thousands of digits", text, 0) from None


def load_json(data: bytes, name: str):
    """The value in a user's JSON file, in any encoding that data files may have. ValueError naming file and line."""
    try:
        return parse_json(decode_text(data, name), unique_keys=True)
    except DuplicateKey as error:
        raise ValueError(
            f"{name} line {error.lineno} begins an object that has the key {error.key!r} twice, of which only one could "
            "count; remove one"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None


# ---- text -> YAML


def load_yaml(data: bytes, name: str):
    """The value in a user's YAML file, in any encoding that data files may have. ValueError naming file and line.

    A key that stands twice is refused, and so is an alias: a few of them can stand for gigabytes.
    """
    import yaml  # transformers needs it

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(
                    problem="an alias (*) is not read here", problem_mark=self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if (name := str(key.value)) in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {name!r} stands twice", problem_mark=key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    text = decode_text(data, name)
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name}{place} is not valid YAML: {error.problem}") from None
    except RecursionError:
        raise ValueError(f"{name} is not valid YAML: brackets are nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
