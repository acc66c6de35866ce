"""Text of users or of the model as the page shows it: rendered where that is harmless, never run.

Nothing here takes more than linear time, whatever the text, and neither does the page with what comes out: its
Markdown parser takes time that grows with the square of open emphasis, brackets and nesting, so these are bounded.
"""

import re
import string
from itertools import islice

LATEX_DELIMITERS = (
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
)
# A code block as the page's own Markdown parser (marked) finds it, but only in the first column: there it
# cannot be a part of a list or a quotation, which would end it earlier.
FENCE = re.compile(
    r"^(?P<fence>`{3,}(?=[^`\n]*(?:\n|$))|~{3,})(?P<info>[^\n]*)(?:\n|$)"
    r"(?:|(?P<code>[\s\S]*?)(?:\n|$))(?:(?P<closed> {0,3}(?P=fence)[~`]* *(?=\n|$))|\Z)",
    re.MULTILINE,
)
BACKTICKS = re.compile("`+")
PIECE = re.compile(r"[\n\\]|\$\$")  # lines, formulas and escapes
MAX_FORMULAS = 5000  # characters of all formulas; the page takes a millisecond for each
MAX_COLOURED = 10_000  # characters of all code blocks whose language the page's highlighter is told
MAX_PIECES = 2000  # rendered; what comes behind them is shown as plain text
MAX_NESTING = 16  # of quotations and lists that begin in one line
MAX_INDENTATION = 40  # columns; a list in a list is indented by two or more
MARKER = r"[ \t]{0,4}(?:>|(?:[-*+]|\d{1,9}[.)])[ \t])"
NESTED = re.compile(rf"(?:{MARKER}){{{MAX_NESTING}}}(?={MARKER})")
SPACES = re.compile(rf"([ \t]{{{MAX_INDENTATION}}})([ \t]+)")
OPENS = re.compile(r"[*_~]+|\[")  # what may begin emphasis or a link: the parser looks for its end in the whole block
MAX_LOOKED_AT = 2_000_000  # characters that the parser looks at for this, a quarter of a second
# The line below a table's head. No two parts of it can take the same character, so it is matched in linear time.
TABLE = re.compile(r"^[ >\t]*(?:\|[ \t]*)?:?-[-:| \t]*$", re.MULTILINE)
MAX_CELLS = 5000  # of all tables; every row gets as many cells as the head has
ITEM = re.compile(r" {0,3}(?:[-*+]|#{1,6})[ \t]")  # always begins a block of its own
NUMBERED = re.compile(r" {0,3}\d{1,9}[.)][ \t]")  # begins one behind another numbered item
MATH_MARK = "\ue000{}\ue001"  # private characters, taken out of the text first


def as_markdown(text: str) -> str:
    """Markdown that shows `text` with its Markdown, code and formulas, and every HTML tag and image as text.

    Tags and entities inside code blocks are left to the page, whose sanitizer comes after both.
    """
    text, rest = cut(re.sub("[\ue000\ue001]", "", text))
    formulas = []
    for delimiter in LATEX_DELIMITERS:  # in the page's order: a formula may hold what looks like a code block
        text = take_formulas(text, delimiter["left"], delimiter["right"], formulas)
    parts, end, renderer, block = [], 0, Parts(), None
    for block in FENCE.finditer(text):
        parts.append(renderer.render(text[end : block.start()]))
        parts.append(renderer.render_code(block))
        end = block.end()
    text = "".join([*parts, renderer.render(text[end:])])
    text = re.sub("\ue000(\\d+)\ue001", lambda match: formulas[int(match[1])], text)
    if not rest:
        return text
    open_fence = block["fence"] if block and block["closed"] is None else ""
    return f"{text}\n{open_fence}\n\n{code_block(rest)}"


def cut(text):
    """(the part with at most MAX_PIECES pieces, the rest)."""
    first = next(islice(PIECE.finditer(text), MAX_PIECES, None), None)  # of the rest
    return (text[: first.start()], text[first.start() :]) if first else (text, "")


def code_block(text):
    """A code block of no language, with a fence that is not in the text."""
    fence = "~" * (1 + max(map(len, re.findall("~+", text)), default=2))
    return f"{fence}\n{text}\n{fence}"


def take_formulas(text, left, right, formulas):
    """The text with a mark for each of its formulas, which are added to the list as they are shown."""
    parts, end, room = [], 0, MAX_FORMULAS - sum(map(len, formulas))
    while (start := text.find(left, end)) >= 0:
        stop = text.find(right, start + len(left) + 1)
        if stop < 0:  # nor does any later one end
            break
        stop += len(right)
        parts += [text[end:start], MATH_MARK.format(len(formulas))]
        formula = text[start:stop]
        room -= len(formula)
        # Its * and _ are no emphasis; the page reads the formula when it has decoded them.
        formulas.append(escape_opens(escape_tags(formula)) if room >= 0 else f"<code>{literally(formula)}</code>")
        end = stop
    return "".join([*parts, text[end:]])


def literally(text: str) -> str:
    """Markdown that shows `text` as it is: a prompt of ADGEN is full of * and #."""
    text = re.sub(r"^ +", lambda match: "\u00a0" * len(match[0]), text, flags=re.MULTILINE)
    return "".join(f"&#{ord(char)};" if char in string.punctuation else char for char in text)


class Parts:
    """Renders the code blocks and what is between them, and keeps count of the work that this leaves to the page."""

    def __init__(self):
        self.to_look_at, self.cells, self.to_colour = MAX_LOOKED_AT, MAX_CELLS, MAX_COLOURED

    def render(self, text):
        return "\n".join(map(self.bound, blocks(map(render_line, text.split("\n")))))

    def render_code(self, block):
        """A match of FENCE as it is; without its language where it would be drawn, or too long to be coloured."""
        self.to_colour -= len(block[0])
        if self.to_colour >= 0:
            return re.sub(r"^(\S*?)mermaid", r"\1text", block[0], flags=re.IGNORECASE)
        fence, info = block["fence"], block["info"]
        return f"{fence}text{block[0][len(fence) + len(info) :]}"

    def bound(self, block):
        """The block, without emphasis and links, or without its table, where finding or filling them takes too long."""
        looked_at = len(block) * len(OPENS.findall(block))
        if looked_at > self.to_look_at:
            block = escape_opens(block)
        else:
            self.to_look_at -= looked_at
        cells = max((head.count("|") + 1 for head in TABLE.findall(block)), default=0) * (block.count("\n") + 1)
        if cells > self.cells:
            return block.replace("|", "&#124;")
        self.cells -= cells
        return block


def blocks(lines):
    """Lines joined to what the page's parser reads as one: paragraphs and items of a list, or more than one of them."""
    block, numbered = [], False
    for line in lines:
        is_numbered = bool(NUMBERED.match(line))
        if block and (not line.strip() or ITEM.match(line) or (numbered and is_numbered)):
            yield "\n".join(block)
            block = []
        if not block:
            numbered = is_numbered
        block.append(line)
    yield "\n".join(block)


def render_line(line):
    """A line, in which code spans end. Too many quotations and lists, and too much indentation, are shown as written."""
    line = SPACES.sub(lambda match: match[1] + "\u00a0" * len(match[2]), line)
    deep = NESTED.match(line)
    return f"{deep[0]} {literally(line[deep.end() :].lstrip())}" if deep else escape_line(line)


def escape_opens(text):
    return OPENS.sub(lambda match: literally(match[0]), text)


def escape_line(line):
    """Code spans: from a run of backticks to the next one that is as long."""
    runs = list(BACKTICKS.finditer(line))
    closing, later = {}, {}  # a run -> the next one that is as long; its text -> the first such run behind it
    for run in reversed(runs):
        closing[run] = later.get(run[0])
        later[run[0]] = run
    parts, end = [], 0
    for run in runs:
        if run.start() >= end and closing[run]:
            code = literally(line[run.end() : closing[run].start()].strip())
            parts += [escape_tags(line[end : run.start()]), f"<code>{code}</code>"]
            end = closing[run].end()
    return "".join([*parts, escape_tags(line[end:])])


def escape_tags(text):
    """Show what would be a tag, an entity, an image or a link definition as it is written."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return text.replace("![", "!&#91;").replace("]:", "]&#58;")
