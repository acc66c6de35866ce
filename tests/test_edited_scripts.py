"""train.sh after the edits of users: every slip ends in a message that says where, and nothing is trained."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT, SAMPLE, TINY

from arguments import parse_flags

PROGRAM = """
import sys
from arguments import parse_flags
from common.failure import run
run(parse_flags, sys.argv[1:])
print(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path):
    """A copy of the scripts' folder, with a main.py that takes its words as the real one, prints them, and ends."""
    shutil.copytree(ROOT / "ptuning", tmp_path / "ptuning", ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    for script in ROOT.glob("*.sh"):  # one may end as another
        shutil.copy(script, tmp_path)
    (tmp_path / "ptuning" / "main.py").write_text(PROGRAM)
    for name in ("adgen-tiny-pt-128-2e-2", "adgen-tiny-full-1e-4"):  # runs that the scripts which evaluate look for
        (tmp_path / "output" / name).mkdir(parents=True)
    return tmp_path


def run_edited(folder, edit, script="train.sh"):
    """The finished process of a script whose text went through `edit`."""
    (folder / script).write_bytes(edit((ROOT / script).read_text("utf-8")).encode("utf-8"))
    environment = {"PATH": subprocess.os.environ["PATH"], "MODEL": str(TINY), "DATA": str(SAMPLE), "NUM_GPUS": "1"}
    return subprocess.run(["bash", script], cwd=folder, capture_output=True, text=True, timeout=60, env=environment)


def line_of(text, part):
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


def replaced(old, new):
    def edit(text):
        assert text.count(old) == 1
        return text.replace(old, new)

    return edit


SEED_LINE = '  --max_steps "$MAX_STEPS" \\\n'
# What is written in place of the line of --max_steps, and how far below it the command goes on, which bash has ended.
ENDS = {
    "a comment behind the \\": ('  --max_steps "$MAX_STEPS" \\ # more\n', 1),
    "a space behind the \\": ('  --max_steps "$MAX_STEPS" \\ \n', 1),
    "no \\": ('  --max_steps "$MAX_STEPS"\n', 1),
    "a comment instead of the \\": ('  --max_steps "$MAX_STEPS" # more\n', 1),
    "a flag commented out": ('  # --max_steps "$MAX_STEPS" \\\n', 1),
    "an empty line": (SEED_LINE + "\n", 2),
    "a comment between empty lines": (SEED_LINE + "\n# more\n\n", 4),
}


@pytest.mark.parametrize(("lines", "offset"), ENDS.values(), ids=ENDS.keys())
def test_a_command_that_ends_too_early_is_said_with_the_first_line_that_is_lost(lines, offset, folder):
    done = run_edited(folder, replaced(SEED_LINE, lines))
    number = line_of((ROOT / "train.sh").read_text(), "--max_steps") + offset
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: train.sh, line {number}: this line is not part of the command, which has ended"
    )
    assert done.stderr.splitlines()[1] == "    --logging_steps 10 \\"
    assert len(done.stderr.splitlines()) == 2 and done.stdout == ""


def test_the_last_line_of_a_command_is_missed_too(folder):
    done = run_edited(folder, lambda text: text.replace('"$QUANTIZATION_BIT"} \\\n', '"$QUANTIZATION_BIT"}\n'))
    assert done.returncode == 2 and done.stderr.splitlines()[1] == '    "$@"'


def test_a_line_without_its_second_quotation_mark_is_said(folder):
    done = run_edited(folder, replaced(SEED_LINE, '  --max_steps "$MAX_STEPS \\\n'))
    number = line_of((ROOT / "train.sh").read_text(), "--max_steps")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: train.sh, line {number}: a quotation mark without its partner.\n")
    assert len(done.stderr.splitlines()) == 2 and done.stdout == ""


# What bash takes for text, and main.py does not.
PROSE = {
    "quotation marks": (
        "  --max_steps “$MAX_STEPS” \\\n",
        """'“3000”' (behind --max_steps): the quotation marks of prose""",
    ),
    "a dash": ('  —max_steps "$MAX_STEPS" \\\n', "begins with a dash of prose. Write --max_steps"),
    "quotation marks in a variable": (
        "  --max_steps “5” \\\n",
        'the quotation marks of prose are part of it. Write "5"',
    ),
}


@pytest.mark.parametrize(("lines", "message"), PROSE.values(), ids=PROSE.keys())
def test_a_sign_of_prose_is_said_with_its_flag(lines, message, folder):
    done = run_edited(folder, replaced(SEED_LINE, lines))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_bash_cannot_read_is_said_before_anything_runs(folder):
    done = run_edited(folder, replaced("launch ptuning", "if true; then launch ptuning"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: bash cannot read train.sh: line \d+: syntax error: .*\n", done.stderr)


def test_a_variable_without_its_second_quotation_mark_is_said_with_its_line(folder):
    done = run_edited(folder, replaced("LR=${LR:-2e-2} ", 'LR="2e-2 '))
    number = line_of((ROOT / "train.sh").read_text(), "LR=${LR:-2e-2}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: train.sh, line {number}: a quotation mark without its partner.\n")


SCRIPTS = ["train.sh", "train_chat.sh", "train_preference.sh", "finetune.sh", "evaluate.sh", "evaluate_finetune.sh"]


@pytest.mark.parametrize("script", SCRIPTS + ["web_demo.sh", "train_web.sh"])
def test_windows_line_ends_are_one_message(script, folder):
    done = run_edited(folder, lambda text: text.replace("\n", "\r\n"), script)
    assert done.returncode == 2
    assert done.stderr == f"error: {script} has Windows line ends. Remove them: sed -i 's/\\r$//' {script}\n"
    assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_slips_starts_the_program_with_all_its_flags(script, folder):
    done = run_edited(folder, lambda text: text, script)
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"^  --(\w+)", (ROOT / script).read_text(), re.MULTILINE)
    assert [name for name in expected if f"'--{name}'" not in done.stdout] == []


HARMLESS = {
    "quotation marks of prose in a value": (SEED_LINE, SEED_LINE + "  --source_prefix '“广告”：' \\\n"),
    "such marks alone": (SEED_LINE, SEED_LINE + "  --source_prefix=“广告” \\\n"),
    "marks without a partner": (SEED_LINE, SEED_LINE + "  --source_prefix 'a \"quoted word: ' \\\n"),
    "a list over two lines": ("launch ptuning", "more=(--seed 1\n  --data_seed 2)\nlaunch ptuning"),
    "a list that ends behind a flag": (
        "launch ptuning",
        "more=(\n  --seed 1 # one\n\n  --data_seed 2)\nlaunch ptuning",
    ),
    "a list behind the command": (SEED_LINE, SEED_LINE + "  $(echo --seed 1 # one\n  echo --data_seed 2) \\\n"),
    "a text of flags for the command": ('  "$@"\n', '  "$@" <<TEXT\n  --seed 1\nTEXT\n'),
    "a value of two lines": (SEED_LINE, SEED_LINE + '  --source_prefix "one\n  --two" \\\n'),
    "commands behind it": ('  "$@"\n', '  "$@"\n\n# the end\necho --seed\n'),
    "a comment with a \\": ("LR=${LR:-2e-2} ", "# a flag ends in \\ \nLR=${LR:-2e-2} "),
    "text in quotes": (SEED_LINE, SEED_LINE + '  --source_prefix "“写” — # 1" \\\n'),
    "an apostrophe in a comment": ("LR=${LR:-2e-2} ", 'LR=${LR:-2e-2} # don\'t raise it; "2e-2" is '),
    "a list": ("launch ptuning", "more=(\n  --seed\n  1\n)\nlaunch ptuning"),
    "a string of two lines": ("launch ptuning", 'echo "one\ntwo"\nlaunch ptuning'),
    "text of several lines": ("launch ptuning", "cat <<TEXT\n  --seed 1\n  --seed 2\nTEXT\nlaunch ptuning"),
}


@pytest.mark.parametrize(("old", "new"), HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_no_slip_is_let_through(old, new, folder):
    done = run_edited(folder, replaced(old, new))
    assert (done.returncode, done.stderr) == (0, "")
    assert "'--pre_seq_len'" in done.stdout


# ---- main.py, which has only the words, called by a script of 2023


WORDS = {
    "Windows line ends": (["--do_train\r"], r"'--do_train\\r' \(before the first flag\) ends in \\r: .*sed -i"),
    "nothing but a line end": (["\r"], r"Windows line ends"),
    "a comment behind the \\": (["--do_train", " #", "more"], "A comment stands behind --do_train, where"),
    "a space behind the \\": (["--do_train", "--max_steps", "5", " "], "A space stands behind --max_steps, where"),
    "one dash": (["--do_train", "-max_steps", "5"], "begins with two dashes. Write --max_steps"),
    "a dash of prose": (["—do_train"], "Write --do_train"),
    "quotation marks of prose": (["--output_dir", "“o”"], 'Write "o"'),
    "a path with a space": (
        ["--do_train", "--train_file", "my", "rows.json"],
        "Stray word rows.json: it stands behind --train_file my, which takes one value. .* in quotes",
    ),
}


@pytest.mark.parametrize(("words", "message"), WORDS.values(), ids=WORDS.keys())
def test_a_word_that_only_a_slip_makes_is_explained(words, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(words)
