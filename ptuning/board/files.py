"""Which paths the page may use, and where the rows lie that it trains on.

A visitor's text becomes a path in one place, `Roots.checked`. Rows that the scripts would not find by their names are
linked into a folder of their own, so a command from the page works in a terminal.
"""

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import zlib
from pathlib import Path

from common.files import write_json
from common.messages import cut_short
from data.dataset_info import DATASET_INFO_FILE
from data.rows import check_data_file, glance, read_rows

PROJECT = Path(__file__).resolve().parents[2]
OUTPUT = PROJECT / "output"
UPLOADS = "_uploads"  # in output/: files that came through the browser, and folders of links to rows
MAX_TEXT = 500  # characters of a field
MAX_UPLOAD_BYTES = 2**30
MOST_READ_BYTES = 2**26  # of a file, to show its rows
MAX_SOURCES = 8  # files of rows in one run
MAX_COLUMNS = 100
COLUMNS = ("prompt", "response", "history", "messages")  # that a visitor names; the scripts' are these and query
FIRST_ROWS = 20  # whose columns are offered
ENDINGS = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")  # that the scripts look for
RUN_NAME = re.compile(r"[A-Za-z0-9\u4e00-\u9fff][\w.+\u4e00-\u9fff-]{0,99}")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def plain_text(value, name: str, most: int = MAX_TEXT) -> str:
    """`value` as one line of text without space around it. ValueError for anything else; `name` is what it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: expected a text or a number.")
    text = str(value).strip()
    if len(text) > most:
        raise ValueError(f"{name} has {len(text):,} characters, expected at most {most}.")
    if CONTROL.search(text):
        raise ValueError(f"{name} holds a line break or a control character. Write it on one line.")
    return text


def run_name(value) -> str:
    """A name that becomes a folder in output/. ValueError for one that could lead elsewhere."""
    name = plain_text(value, "The name of the run", 100)
    if not RUN_NAME.fullmatch(name):
        raise ValueError(
            f"The name of the run is {cut_short(name)!r}; expected letters, digits, and . _ + - behind the first one, such "
            "as my-run."
        )
    return name


class Roots:
    """The folders below which the page may read and write."""

    def __init__(self, folders):
        self.folders = [Path(folder).expanduser().resolve() for folder in folders]

    def allows(self, path: Path) -> bool:
        """True for a path that lies below an allowed folder, once every link in it is followed."""
        return any(path == folder or path.is_relative_to(folder) for folder in self.folders)

    def checked(self, text, name: str) -> Path:
        """The path that a visitor typed, relative to the project, links followed. ValueError outside the folders."""
        text = plain_text(text, name)
        try:
            path = (PROJECT / Path(text).expanduser()).resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name} {cut_short(text)!r} is no path ({error}).") from None
        if not self.allows(path):
            allowed = ", ".join(map(str, self.folders))
            raise ValueError(
                f"{name} {cut_short(text)!r} leads out of the folders that this page may use: {allowed}. Start it with "
                "--root FOLDER to allow another."
            )
        return path


def shown_path(path: Path) -> str:
    """A path as it stands in a command: relative to the project where it lies in it."""
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def free_name(folder: Path, name: str) -> str:
    """`name`, or with -2, -3, … behind it the first that is not in a folder yet."""
    name = re.sub(r"-\d{1,3}$", "", name) if (folder / name).exists() else name
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, 1000))) if not (folder / each).exists())


# ---- rows


def ending_of(path: Path) -> str:
    """The ending by which the scripts know a format. ValueError for another one."""
    name = path.name.lower()
    found = [ending for ending in ENDINGS if name.endswith(ending)]
    if not found:
        raise ValueError(f"{path.name}: expected a name that ends in {', '.join(ENDINGS)}. Rename the file.")
    return max(found, key=len)


def columns_of(path: Path) -> tuple[list[str], list[dict], int | None]:
    """(names of columns, first rows, number of rows or None) of a file of rows. Raises as read_rows.

    Of a file with more than MOST_READ_BYTES only the first row is read, where that can be.
    """
    ending = ending_of(path)
    check_data_file(path)
    if is_longer(path, MOST_READ_BYTES):
        row, count = (None, None) if ending.endswith(".gz") else glance(path)
        rows = [row] if row else []
    else:
        rows = read_rows(path)
        count = len(rows)
    names = dict.fromkeys(name for row in rows[:FIRST_ROWS] for name in row)
    return list(names)[:MAX_COLUMNS], rows[:3], count


def is_longer(path, most):
    """True for a file of more than `most` bytes, unpacked. ValueError for a damaged .gz file."""
    if path.suffix.lower() != ".gz":
        return path.stat().st_size > most
    try:
        with gzip.open(path) as opened:
            while most >= 0 and (part := opened.read(2**20)):
                most -= len(part)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); copy it again, or name the unpacked file") from None
    return most < 0


def files_in(folder: Path) -> dict[str, Path]:
    """{"train": file, "dev": file} of a folder in the layout of the scripts, as far as they are there."""
    found = {}
    for split in ("train", "dev"):
        places = [folder / f"{split}{ending}" for ending in ENDINGS]
        found.update({split: next(filter(Path.is_file, places), None)})
    return {split: file for split, file in found.items() if file}


def guessed(columns: list[str]) -> dict[str, str]:
    """{column of ours: its likely name in the rows}."""
    likely = {
        "prompt": "content prompt question instruction query input 问题 输入".split(),
        "response": "summary response answer output completion 回答 输出".split(),
        "history": ["history", "历史"],
        "messages": ["messages", "conversations"],
    }
    return {
        kind: next((column for name in names for column in columns if column.lower() == name), "")
        for kind, names in likely.items()
    }


def link_rows(sources: list[dict], dev: Path | None, output: Path | None = None) -> Path:
    """A folder in output/_uploads/ with links to files of rows under the names that the scripts look for.

    `sources` are {"path", "prompt", "response", "history", "messages"}. Several are described in a dataset_info.json, as
    data sets a, b, …, and lie there themselves: nothing outside the folder of a dataset_info.json is read. Without any there
    are dev rows only. The folder's name follows from what it holds. OSError on a full disk.
    """
    key = "\n".join([*(repr(sorted(source.items(), key=str)) for source in sources), str(dev)])
    stem = re.sub(r"[^\w-]+", "-", (Path(sources[0]["path"]) if sources else dev).stem).strip("-_")[:40] or "rows"
    folder = (output or OUTPUT) / UPLOADS / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    links = {f"train{ending_of(Path(source['path']))}": source["path"] for source in sources[:1]}
    if dev:
        links[f"dev{ending_of(dev)}"] = dev
    if len(sources) > 1:
        entries = {}
        for letter, source in zip("abcdefgh", sources, strict=False):
            name = f"{letter}{ending_of(Path(source['path']))}"
            place_file(folder / name, source["path"])
            entries[letter] = {"file_name": name, "columns": {kind: source[kind] for kind in COLUMNS if source[kind]}}
        write_json(folder / DATASET_INFO_FILE, entries)
    for name, target in links.items():
        place_link(folder / name, Path(target).resolve())
    return folder


def place_link(link, target):
    """Make `link` lead to `target`; nothing happens where it does already."""
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def place_file(place, source):
    """Make `place` the file `source` itself, without a second copy of its bytes where both are on one disk."""
    with contextlib.suppress(OSError):
        if not os.path.islink(place) and os.path.samefile(place, source):
            return
    new = place.with_name(f".{place.name}.new")
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:  # another disk, or one that knows no such links
        with contextlib.suppress(OSError):
            there, here = os.stat(source), os.stat(place)
            if (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns):
                return
        shutil.copy2(source, new)
    new.replace(place)


def keep_upload(temporary, name, output: Path | None = None) -> Path:
    """Move an uploaded file into output/_uploads/ under its own name, made harmless. ValueError for one that is too large."""
    temporary = Path(temporary)
    if temporary.stat().st_size > MAX_UPLOAD_BYTES:
        raise ValueError(f"The file has {temporary.stat().st_size:,} bytes, expected at most {MAX_UPLOAD_BYTES:,}.")
    name = re.sub(r"[^\w.\u4e00-\u9fff-]+", "-", Path(str(name)).name).lstrip(".-")[-80:]
    ending_of(Path(name))
    digest = hashlib.sha256(f"{temporary.stat().st_mtime_ns} {temporary.stat().st_size}".encode()).hexdigest()[:6]
    folder = (output or OUTPUT) / UPLOADS / f"upload-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(temporary, folder / name))
