"""Data sets of the two hubs, Hugging Face and ModelScope -> one file of JSON lines in the cache of `datasets`.

Answers to the `hf_hub_url` of ChatGLM-Efficient-Tuning and the `ms_hub_url` of its successor. `datasets` reads tables and
JSON only: no code of a data set is run.
"""

import hashlib
import json
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath

from common.messages import first_line
from data.cache import FOLDER
from data.examples import progress_bars

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # of `datasets`
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # beside the rows of a repository
MOST_FILES = 1000
MOST_ANSWER_BYTES = 2**22  # of a list of files
SECONDS_TO_ANSWER = 30


def fetch_rows(hub: str, name: str, split: str, subset: str | None, place: str) -> Path:
    """The JSON lines of a split of the data set `name` ("owner/name"); `hub` is hf_hub_url or ms_hub_url.

    What was fetched before is not fetched again. ValueError, naming the entry `place` of a dataset_info.json, where the
    hub does not give it.
    """
    import datasets

    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).exists():  # `datasets` reads folders, too
        raise ValueError(
            f"{place}: {hub} is {name!r}; expected owner/name of a data set on the hub, and no file or folder"
        )
    folder = Path(datasets.config.HF_DATASETS_CACHE, FOLDER)
    try:
        with progress_bars(False):
            if hub == "ms_hub_url":
                reader, files = _files_of_modelscope(name, split, subset, folder)
                dataset = datasets.load_dataset(reader, data_files=files, split="train")
            else:
                dataset = datasets.load_dataset(name, subset, split=split)
    except MemoryError:
        raise
    except Exception as error:  # of three libraries and the network
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error
        mirror = "MODELSCOPE_DOMAIN" if hub == "ms_hub_url" else "HF_ENDPOINT"
        raise ValueError(
            f"{place}: the hub did not give {hub} {name!r}, split {split!r} ({first_line(error)}). Check name and network, "
            f"set {mirror} to a mirror, or download the rows into --dataset_dir and name them as file_name"
        ) from None
    key = hashlib.sha256(json.dumps([hub, name, split, subset, dataset._fingerprint]).encode()).hexdigest()[:16]
    file = folder / f"{name.replace('/', '-')}-{key}.jsonl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        with progress_bars(False):
            dataset.to_json(unfinished, force_ascii=False)
        unfinished.replace(file)
    return file


def _files_of_modelscope(name, split, subset, folder):
    """(the reader of `datasets`, the data files of a repository, fetched into a folder): those of the split, if any are
    named so.
    """
    domain = os.environ.get("MODELSCOPE_DOMAIN", "www.modelscope.cn")
    site = domain.rstrip("/") if "://" in domain else f"https://{domain}"
    quoted = urllib.parse.quote(name)
    number = _answer_of(f"{site}/api/v1/datasets/{quoted}")["Id"]
    query = {"Revision": "master", "Root": subset or "/", "Recursive": "True", "PageNumber": 1, "PageSize": MOST_FILES}
    listed = _answer_of(f"{site}/api/v1/datasets/{number}/repo/tree?{urllib.parse.urlencode(query)}")["Files"]
    paths = [PurePosixPath(entry["Path"]) for entry in listed if entry.get("Type") != "tree"]
    paths = sorted(path for path in paths if path.suffix in READERS and path.name not in DESCRIPTIONS)
    named = [path for path in paths if split in path.stem]
    if not named and split == "train":  # the files that are of no other split
        named = [path for path in paths if not any(word in path.stem for word in ("test", "valid", "dev", "eval"))]
    readers = {READERS[path.suffix] for path in named}
    if len(readers) != 1:
        found = ", ".join(map(str, paths)) or "none"
        raise ValueError(f"it has no data files of one kind for this split; of {', '.join(READERS)} it has: {found}")
    sizes = {entry["Path"]: entry["Size"] for entry in listed}
    return readers.pop(), [
        str(
            _fetched(
                f"{site}/datasets/{quoted}/resolve/master/{urllib.parse.quote(str(path))}", sizes[str(path)], folder
            )
        )
        for path in named
    ]


def _fetched(address, size, folder):
    """The file of `size` bytes at an address, kept in a folder. OSError where the server gives fewer, or more."""
    suffix = PurePosixPath(address).suffix
    file = folder / (hashlib.sha256(f"{address} {size}".encode()).hexdigest()[:32] + suffix)
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        with urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER) as answer, open(unfinished, "wb") as opened:
            while part := answer.read(2**20):
                opened.write(part)
                if opened.tell() > size:
                    break
        if (found := unfinished.stat().st_size) != size:
            unfinished.unlink()
            raise OSError(f"{address} has {found:,} bytes, its list says {size:,}")
        unfinished.replace(file)
    return file


def _answer_of(address):
    """The Data of an answer of ModelScope's API. ValueError and OSError where there is none."""
    with urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER) as answer:
        found = json.loads(answer.read(MOST_ANSWER_BYTES))
    if not isinstance(found, dict) or not isinstance(found.get("Data"), dict):
        raise ValueError(f"{address} answers nothing of use")
    return found["Data"]
