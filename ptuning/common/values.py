"""Of which kind a value from a JSON file is. It loads no torch."""

LARGEST = 2**53  # beyond it a number of steps or rows is none


def is_integer(value) -> bool:
    """True for a whole number; Python takes true and false for numbers, this function does not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value, least: int = 0) -> bool:
    """True for a whole number from `least` up to, but not, LARGEST."""
    return is_integer(value) and least <= value < LARGEST


def is_number(value) -> bool:
    """True for a number that can be computed with, NaN and Infinity among them."""
    return isinstance(value, float) or (is_integer(value) and abs(value) < LARGEST)


def is_text(value: str) -> bool:
    """True for a text that UTF-8 can hold: without halves of characters, as which Python reads other bytes of a command."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
