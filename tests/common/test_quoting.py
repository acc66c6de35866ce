"""Names in hints: what stands there can be pasted into bash, and shows what cannot be seen."""

import json
import shlex
import subprocess

import pytest
from support.command_lines import MINIMAL

from arguments import parse_flags
from common.quoting import as_typed, flag_as_typed
from data.examples import load_examples


@pytest.fixture
def write(tmp_path):
    def write_rows(rows):
        (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
        return tmp_path / "train.json"

    return write_rows


NAMES = {
    "content": "content",
    "类型.2/a-b": "类型.2/a-b",
    "my content": "'my content'",
    " content": "' content'",
    "content ": "'content '",
    "it's": """'it'"'"'s'""",
    'say "x" $HOME `ls` !': """'say "x" $HOME `ls` !'""",
    "ｃｏｎｔｅｎｔ": "'ｃｏｎｔｅｎｔ'",
    "a;b": "'a;b'",
    "": "''",
    "\ufeffcontent": r"$'\xef\xbb\xbfcontent'",
    "con\u200btent's\\": r"$'con\xe2\x80\x8btent\'s\\'",
    "content\u3000": r"$'content\xe3\x80\x80'",
    "a\tb\nc": r"$'a\x09b\x0ac'",
    "\u3164a": r"$'\xe3\x85\xa4a'",
}
ODD_STARTS = ["-content", "--content", "#id", " #id", "“content”", "content”", "—", " ", "$HOME", "~", "*"]


@pytest.mark.parametrize(("name", "typed"), NAMES.items())
def test_a_name_is_quoted_where_it_cannot_be_typed_bare(name, typed):
    assert as_typed(name) == typed


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("name", [*filter(None, NAMES), *ODD_STARTS])
def test_bash_and_the_program_read_the_pasted_flag_as_the_name(name, locale):
    hint = flag_as_typed("--prompt_column", name)
    line = f"printf '%s\\0' {MINIMAL} {hint}"
    printed = subprocess.run(["bash", "-c", line], env={"LC_ALL": locale}, capture_output=True, check=True).stdout
    assert parse_flags(printed.decode().split("\0")[:-1])[1].prompt_column == name


@pytest.mark.parametrize(
    ("column", "given"),
    [("content ", "content"), ("\ufeffcontent", "content"), ("con tent", "content"), ("ｃontent", "content")],
)
@pytest.mark.parametrize("flag", ["prompt_column", "response_column", "history_column", "messages_column"])
def test_the_hint_for_a_column_names_it_as_it_is_typed(flag, column, given, write):
    path = write([{column: "a", "b": "b"}])
    flags = {"prompt_column": "b", "response_column": "b", flag: given}
    with pytest.raises(ValueError) as refused:
        load_examples(path, **flags)
    assert f"did you mean --{flag} {as_typed(column)}?" in str(refused.value)
    assert f"its columns are: {as_typed(column)}, b;" in str(refused.value)


def test_a_word_behind_a_value_is_shown_as_bash_takes_it():
    line = f"{MINIMAL} --source_prefix $HOME is `here`"
    with pytest.raises(ValueError, match="Stray word is: it stands behind --source_prefix '[$]HOME', which"):
        parse_flags(shlex.split(line))


def test_the_hint_names_no_column_that_another_flag_has(write):
    path = write([{"content": "a", "summar": "b", "x": "c"}])
    with pytest.raises(ValueError, match="did you mean --response_column summar?"):
        load_examples(path, "content", "contents_summary")
    with pytest.raises(ValueError, match="name one of them with --response_column"):
        load_examples(write([{"content": "a", "x": "c"}]), "content", "contents")
