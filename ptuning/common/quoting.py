"""Foreign names in hints, as a user can type or paste them into bash."""

import re
import shlex
import unicodedata

# Letters, marks and blanks that no font shows, though Unicode calls them printable.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# What flags.py takes for a flag, a comment or quotation marks of prose, unless it stands behind an equals sign.
NEEDS_EQUALS = re.compile(r"[-–—−－]|#| #|\s+$|[“”‘’＂]|.*[“”‘’＂]$", re.DOTALL)


def is_seen(character: str) -> bool:
    return character.isprintable() and not UNSEEN.match(character)


def as_typed(word: str) -> str:
    """A word for bash: bare where that is plain, else in quotes, in which what cannot be seen stands as bytes.

    Bytes, because bash knows the other escapes, such as \\u200b, in some locales only.
    """
    if all(map(is_seen, word)):
        plain = all(character.isalnum() or character in "_-./:@%+=" for character in word)
        bare = word and plain and unicodedata.normalize("NFKC", word) == word  # full-width letters are not
        return word if bare else shlex.quote(word)
    escaped = ""
    for character in word:
        if not is_seen(character):
            escaped += "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
        else:
            escaped += f"\\{character}" if character in "\\'" else character
    return f"$'{escaped}'"


def flag_as_typed(flag: str, word: str) -> str:
    """A flag with its value, as the program takes it."""
    return f"{flag}{'=' if NEEDS_EQUALS.match(word) else ' '}{as_typed(word)}"
