"""README.md, README_zh.md and docs/: they agree with the code, with each other, and every link leads somewhere."""

import ast
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
from conftest import ROOT

from arguments import DataTrainingArguments, ModelArguments
from common.flags import library_flags, own_flags
from common.flags_of_2023 import RENAMED, RETIRED
from training.flags import TrainingArguments

ENGLISH = [ROOT / "README.md", *(file for file in sorted((ROOT / "docs").glob("*.md")) if "_zh" not in file.stem)]
READMES = ["README.md", "README_zh.md"]
PAGES = [*ENGLISH, *(file.with_stem(f"{file.stem}_zh") for file in ENGLISH)]
LINKED = [*PAGES, ROOT / "AdvertiseGen" / "README.md", ROOT / "benchmarks" / "RESULTS.md"]
FLAG_PAGES = ["docs/flags.md", "docs/flags_zh.md"]
SCRIPTS = [
    "train.sh",
    "train_chat.sh",
    "train_preference.sh",
    "evaluate.sh",
    "finetune.sh",
    "evaluate_finetune.sh",
    "web_demo.sh",
    "train_web.sh",
]
LONGEST_CELL = 120  # characters: two lines


def name_of(file):
    return str(file.relative_to(ROOT))


def split_blocks(text):
    """(text without its code blocks, the code blocks)."""
    blocks = re.findall(r"^```.*?^```$", text, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        text = text.replace(block, "")
    return text, blocks


def prose_of(file):
    return split_blocks(file.read_text(encoding="utf-8"))[0]


def headings(prose):
    """The headings without their marks, in order."""
    return re.findall(r"^#{1,6} (.+)$", prose, flags=re.MULTILINE)


def tables(prose):
    """Every table as a list of rows, its header first; a row is a list of cells."""
    found, rows = [], []
    for line in [*prose.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def section(prose, contains):
    """The text from the heading of level 2 that contains a word to the next one."""
    parts = [part for part in re.split(r"^## ", prose, flags=re.MULTILINE)[1:] if contains in part.splitlines()[0]]
    assert len(parts) == 1, f"{len(parts)} sections have {contains} in their heading"
    return parts[0]


def anchors(file):
    """What GitHub makes of the headings of a page: small letters, no punctuation, hyphens for blanks."""
    found = []
    for heading in headings(prose_of(file)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return found


def links(file):
    """The targets of links and pictures outside code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose_of(file)))


def without_links(cell):
    """What a reader sees of a cell."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell)


# ---------------------------------------------------------------------- flags and variables


def flags_in(rows):
    """The flags that the first cells name."""
    return {flag for row in rows for flag in re.findall(r"--(\w+)", row[0])}


def flags_of_programs():
    """The flags of every program that has a parser of its own, read from its source."""
    found = set()
    for file in (ROOT / "ptuning").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                words = [word.value for word in node.args if isinstance(word, ast.Constant)]
                found |= {word[2:] for word in words if word.startswith("--")}
    return found


OWN = {**own_flags(ModelArguments), **own_flags(DataTrainingArguments), **own_flags(TrainingArguments)}


@pytest.mark.parametrize("page", FLAG_PAGES)
def test_every_flag_of_main_has_a_row_and_every_row_a_flag(page):
    rows = [row for table in tables(section(prose_of(ROOT / page), "main.py")) for row in table]
    assert {*OWN, *RENAMED, *RETIRED} - flags_in(rows) == set(), "no row"
    assert flags_in(rows) - {*OWN, *RENAMED, *RETIRED, *library_flags()} == set(), "no such flag"


@pytest.mark.parametrize("page", FLAG_PAGES)
def test_every_default_of_a_flag_is_the_one_in_its_row(page):
    rows = {
        next(iter(flags_in([row]))): row[1].strip("`")
        for table in tables(section(prose_of(ROOT / page), "main.py"))
        for row in table
        if len(row) == 3 and len(flags_in([row])) == 1
    }
    defaults = {name: str(flag.default).lower() for name, flag in OWN.items() if flag.default not in (None, "")}
    assert {name: rows[name] for name in defaults} == defaults


@pytest.mark.parametrize("page", FLAG_PAGES)
def test_every_flag_of_the_other_programs_has_a_row_and_every_row_a_flag(page):
    part = section(prose_of(ROOT / page), "其他程序" if "_zh" in page else "other programs")
    assert flags_in(row for table in tables(part) for row in table) == flags_of_programs()


def variables_of(script):
    """{variable: its defaults} of a script: its lines NAME=${NAME:-default}, and those of the script that it ends as."""
    found, inherited = {}, {}
    for name, default in re.findall(r"\b([A-Z_]+)=\$\{\1:?-(.*?)\}(?= |$|\s)", script, flags=re.MULTILINE):
        found.setdefault(name, []).append(default)
    if other := re.search(r'^exec bash "\$PWD/(.+?)"', script, flags=re.MULTILINE):
        fixed = re.findall(r"^([A-Z_]+)=(?!\$\{)", script, flags=re.MULTILINE)
        if "FINETUNING_TYPE" in found:
            fixed.append("PRE_SEQ_LEN")  # no prefix
        inherited = variables_of((ROOT / other[1]).read_text(encoding="utf-8"))
        inherited = {name: defaults for name, defaults in inherited.items() if name not in fixed}
    return {**inherited, **found}


def table_of_defaults(page):
    part = section(prose_of(ROOT / page), "变量" if "_zh" in page else "Variables")
    return next(table for table in tables(part) if "train.sh" in table[0])


@pytest.mark.parametrize("page", FLAG_PAGES)
@pytest.mark.parametrize("script", [*SCRIPTS, "`MODEL=tiny`"])
def test_every_variable_of_a_script_has_its_default_in_the_table(page, script):
    header, *rows = table_of_defaults(page)
    column = header.index(script)
    shown = {row[0].strip("`"): row[column].strip("`") for row in rows if row[column]}
    file = ROOT / ("ptuning/tiny/settings.sh" if "tiny" in script else script)
    variables = variables_of(file.read_text(encoding="utf-8"))
    if "tiny" in script:
        variables = {**variables, "MODEL": ["ptuning/tiny"]}
        del variables["OMP_NUM_THREADS"]
    assert shown.keys() == variables.keys()
    for name, defaults in variables.items():
        if not any("$" in default for default in defaults) and defaults != [""]:
            assert re.split(r" ?[(（]", shown[name])[0] in defaults, name


@pytest.mark.parametrize("page", FLAG_PAGES)
def test_every_variable_of_the_scripts_has_a_meaning(page):
    part = section(prose_of(ROOT / page), "变量" if "_zh" in page else "Variables")
    meanings = [row[0] for row in tables(part)[0][1:]]
    assert meanings == [row[0] for row in table_of_defaults(page)[1:]]


# ---------------------------------------------------------------------- examples


@pytest.mark.slow
@pytest.mark.parametrize("language", ["", "_zh"])
def test_the_examples_of_the_python_pages_run(language, tmp_path):
    prefix, many, automatic = code_blocks(f"docs/python{language}.md")
    loop, *elsewhere = code_blocks(f"docs/libraries{language}.md")
    (tmp_path / "ptuning").symlink_to(ROOT / "ptuning")
    trained = re.search('"(output/adgen[^"]*)"', prefix)[1]  # what a run would have left there
    (tmp_path / trained).parent.mkdir(parents=True)
    program = "\n".join(
        (loop, f"import os; os.rename('output/my-prefix', '{trained}')", *elsewhere, prefix, many, automatic)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 6  # an answer with the prefix, two together, one without, two by the others


def code_blocks(page):
    return [block.split("\n", 1)[1].removesuffix("```") for block in split_blocks((ROOT / page).read_text("utf-8"))[1]]


@pytest.mark.parametrize("page", ["docs/python.md", "docs/python_zh.md"])
def test_the_python_page_is_short(page):
    assert len((ROOT / page).read_text("utf-8").splitlines()) <= 60


# ---------------------------------------------------------------------- links and names of files


@pytest.mark.parametrize("file", LINKED, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(file):
    lost = []
    for link in links(file):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("file", LINKED, ids=name_of)
def test_every_file_of_the_project_that_a_page_names_exists(file):
    named = re.findall(
        r"\b(?:ptuning|tests|benchmarks|AdvertiseGen|docs)/[\w/]+\.(?:py|sh|md)\b", file.read_text(encoding="utf-8")
    )
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_page_that_a_message_names_exists():
    named = {}
    for file in [*(ROOT / "ptuning").rglob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*/*.sh")]:
        for page in re.findall(r"[\w/-]+\.md\b", file.read_text(encoding="utf-8")):
            named[page] = file
    assert "docs/data.md" in named
    assert {page: file for page, file in named.items() if not (ROOT / page).is_file()} == {}


@pytest.mark.parametrize("file", ENGLISH[1:], ids=name_of)
@pytest.mark.parametrize("chinese", [False, True])
def test_a_page_begins_with_its_purpose_and_links_back(file, chinese):
    page, other = (file.with_stem(file.stem + "_zh"), file) if chinese else (file, file.with_stem(file.stem + "_zh"))
    title, empty, purpose, back, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and not empty
    assert re.fullmatch("本页[^。]+。" if chinese else r"This page [^.]+\.", purpose)
    readme, language = ("README_zh.md", "English") if chinese else ("README.md", "中文")
    assert back == f"[README](../{readme}) · [{language}]({other.name})"


@pytest.mark.parametrize("chinese", [False, True])
def test_the_readme_links_to_every_page(chinese):
    readme = ROOT / READMES[chinese]
    pages = {f"docs/{file.stem}{'_zh' if chinese else ''}.md" for file in ENGLISH[1:]}
    assert pages - {link.partition("#")[0] for link in links(readme)} == set()


# ---------------------------------------------------------------------- shape


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_is_short(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 15_000


@pytest.mark.parametrize("readme", READMES)
def test_the_first_forty_lines_have_needs_commands_and_the_output_to_expect(readme):
    beginning = "\n".join((ROOT / readme).read_text(encoding="utf-8").splitlines()[:40])
    assert "pip install -r requirements.txt && MODEL=tiny bash train.sh && MODEL=tiny bash evaluate.sh\n" in beginning
    assert "requirements.txt -r tests/requirements.txt && python -m pytest -n 2\n" in beginning
    assert "Python 3.10" in beginning and "12.5 GB" in beginning and "predict_bleu-4   21.8370" in beginning


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_no_cell_of_a_table_is_longer_than_two_lines(file):
    cells = [without_links(cell) for table in tables(prose_of(file)) for row in table for cell in row]
    assert [cell for cell in cells if len(cell) > LONGEST_CELL] == []


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_row_of_a_table_has_the_cells_of_its_header(file):
    for header, *rows in tables(prose_of(file)):
        assert [row for row in rows if len(row) != len(header)] == []


# ---------------------------------------------------------------------- the two languages


@pytest.mark.parametrize("file", ENGLISH, ids=name_of)
def test_both_languages_have_the_same_headings_tables_and_code(file):
    english, chinese = (page.read_text(encoding="utf-8") for page in (file, file.with_stem(f"{file.stem}_zh")))
    (english, blocks), (chinese, blocks_zh) = split_blocks(english), split_blocks(chinese)
    levels = [re.findall(r"^#+(?= )", prose, flags=re.MULTILINE) for prose in (english, chinese)]
    assert levels[0] == levels[1]
    shapes = [[(len(table), len(table[0])) for table in tables(prose)] for prose in (english, chinese)]
    assert shapes[0] == shapes[1]
    assert len(re.findall(r"^(?:- |\d\. )", english, re.M)) == len(re.findall(r"^(?:- |\d\. )", chinese, re.M))
    assert len(blocks) == len(blocks_zh)


@pytest.mark.parametrize("file", ENGLISH, ids=name_of)
def test_both_languages_name_the_same_flags_variables_and_files(file):
    def names(page):
        return {
            word
            for span in re.findall(r"`([^`]+)`", prose_of(page))
            for word in re.findall(r"--\w+|\b[A-Z][A-Z_]{2,}\b|[\w./-]+\.(?:py|sh|json|bin|txt|md)\b", span, re.A)
        }

    assert names(file) == names(file.with_stem(f"{file.stem}_zh"))


@pytest.mark.parametrize("file", ENGLISH, ids=name_of)
def test_both_languages_give_the_same_figures(file):
    def figures(page):
        return set(re.findall(r"(?<![\w.,])(?:\d[\d,]*\.\d+|\d+(?:,\d{3})+|\d{2,})(?!\w|[.,]\d)", prose_of(page), re.A))

    assert figures(file) == figures(file.with_stem(f"{file.stem}_zh"))
