"""The cache of what was read and encoded: used while it is whole, said and built again where it is not."""

import datasets.config
import pytest
from conftest import TINY
from support.rows import ROWS, encode_file, tokenizer, tokenizer_folder, write  # noqa: F401, fixtures
from support.runs import PREDICT_SETTINGS, run

from data.encoding import encode_training
from data.examples import load_examples


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def cut_in_half(content):
    return content[: len(content) // 2]


def with_zeros_inside(content):
    return content[:-900] + bytes(400) + content[-500:]


DAMAGE = {
    "empty": lambda content: b"",
    "cut in half": cut_in_half,
    "garbage": lambda content: b"\xffgarbage" * 99,
    "zeros inside": with_zeros_inside,
    "gone": None,
}


def damage(folder, pattern, change):
    files = [file for file in folder.rglob(pattern) if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        file.unlink()
        if change is not None:
            file.write_bytes(change(content))
    return len(files)


def load(path, tokenizer, say, **settings):  # noqa: F811
    examples, _ = load_examples(path, "content", "summary", say=say, **settings)
    return encode_training(examples, tokenizer, max_source_length=64, max_target_length=64, say=say, **settings)


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("pattern", ["generator-train.arrow", "encoded.arrow", "dataset_info.json", "files.json"])
def test_a_damaged_cache_is_said_and_built_again(pattern, name, cache, tokenizer, write):  # noqa: F811
    path, said = write(ROWS * 50), []
    before = load(path, tokenizer, said.append)[:]
    num_damaged = damage(cache, pattern, DAMAGE[name])
    assert said == []
    assert load(path, tokenizer, said.append)[:] == before
    if (pattern, name) != ("files.json", "gone"):  # what a run leaves that is killed before it is written
        assert len(said) == num_damaged and all("is damaged" in line and line.endswith("again.") for line in said)
    assert load(path, tokenizer, said.append)[:] == before
    assert len(said) <= num_damaged


def test_a_cache_that_is_whole_is_used(cache, tokenizer, write):  # noqa: F811
    path = write(ROWS)
    load(path, tokenizer, print)
    written = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.suffix in (".arrow", ".json")}
    load(path, tokenizer, print)
    assert written == {file: file.stat().st_mtime_ns for file in written}
    load(path, tokenizer, print, overwrite_cache=True)
    assert all(file.stat().st_mtime_ns > before for file, before in written.items())


def test_nothing_outside_a_damaged_entry_is_removed(cache, tokenizer, tmp_path, write):  # noqa: F811
    kept = [cache / "csv" / "x.arrow", cache / "chatglm2-ptuning" / "of another" / "x.arrow", tmp_path / "linked" / "x"]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"kept")
    path = write(ROWS)
    expected = load(path, tokenizer, print)[:]
    for entry in {file.parent for file in cache.rglob("files.json")}:
        for file in entry.rglob("*.arrow"):
            file.write_bytes(b"")
        (entry / "link").symlink_to(tmp_path / "linked")
    assert load(path, tokenizer, print)[:] == expected
    assert all(file.read_bytes() == b"kept" for file in kept)


@pytest.mark.parametrize("overwrite", [None, True])
def test_a_run_with_a_damaged_cache_says_so_once_for_each_and_answers(overwrite, cache, monkeypatch, tmp_path, capsys):
    settings = {**PREDICT_SETTINGS, "max_predict_samples": 2, "check_data": True, "max_source_length": 64}
    settings.update(finetuning_type="none", model_name_or_path=TINY, output_dir=tmp_path / "run")
    settings.update(prompt_column="content", response_column="summary")
    run(monkeypatch, settings)
    first = capsys.readouterr().out
    assert damage(cache, "*.arrow", DAMAGE["empty"]) == 2
    run(monkeypatch, settings, overwrite_cache=overwrite)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "is damaged" not in line] == first.splitlines()
    assert sum("is damaged (" in line for line in lines) == 2
