"""How a value stands in a line for the user. It loads no torch, so that the command line can ask."""

from __future__ import annotations

import json


def dtype_name(dtype) -> str:
    """The name of a torch.dtype without its package: "float16"."""
    return str(dtype).removeprefix("torch.")


def cut_short(text: str, length: int = 60) -> str:
    """The first `length` characters of a text, without space around it, and … for the rest."""
    text = text.strip()
    return text if len(text) <= length else text[:length] + "…"


def short_json(value) -> str:
    """A value from JSON as text, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return cut_short(text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, else its type; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def clock(seconds: float) -> str:
    """A time as hours, minutes, seconds: "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def duration(seconds: float) -> str:
    """A time in its two largest units: "48 s", "12 min 5 s", "3 h 4 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def in_words(size: int) -> str:
    """Bytes as MB below 1 GB, else as GB, in powers of ten."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def silent(*lines: str) -> None:
    """Stands for `print` where nobody listens: says nothing."""
