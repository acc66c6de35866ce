"""dataset_info.json as ChatGLM-Efficient-Tuning and LLaMA-Factory have it: folders, hubs, dialogues, pairs, queries."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from support.hub import served
from support.runs import TRAIN_SETTINGS, run

from arguments import parse_flags
from data.dataset_info import read_dataset_info
from data.examples import load_examples

ROWS = [{"instruction": f"问{number}", "input": "补充", "output": "答"} for number in range(3)]
TURNS = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "嗨"}]
PAIR = {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "走开"}}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of `datasets` that starts empty and that nobody else reads."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


@pytest.fixture
def describe(tmp_path):
    """A function: the folder of a data set `x` with this entry, and with these files."""

    def described(entry, **files):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}), encoding="utf-8")
        for name, rows in files.items():
            (tmp_path / name).write_text(lines(rows), encoding="utf-8")
        return tmp_path

    return described


def source(folder, **how):
    return read_dataset_info(folder, "x", **how)[0]["x"]


def load(folder, **more):
    return load_examples(**source(folder), **more)[0]


# ---- files


def test_a_folder_of_files_is_one_data_set_in_the_order_of_their_names(describe, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "b.jsonl").write_text(lines(ROWS[:1]), encoding="utf-8")
    (tmp_path / "parts" / "a.csv").write_text("instruction,input,output\n问,,答\n", encoding="utf-8")
    (tmp_path / "parts" / ".hidden").write_text("no rows")
    folder = describe({"file_name": "parts", "file_sha1": "0" * 40})
    assert load(folder)["prompt"][:] == ["问", "问0\n补充"]
    assert read_dataset_info(folder, "x")[1] == [f"{tmp_path / 'parts'} is a folder: its file_sha1 is not compared."]
    (tmp_path / "parts" / "b.jsonl").write_text(lines(ROWS), encoding="utf-8")
    assert len(load(folder)) == 4  # read again


def test_a_folder_is_read_no_further_than_its_own_files(describe, tmp_path, tmp_path_factory):
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="parts is empty, the folder of 'x'"):
        source(describe({"file_name": "parts"}))
    (tmp_path / "parts" / "a.json").symlink_to(tmp_path_factory.mktemp("elsewhere") / "secret.json")
    (tmp_path / "parts" / "a.json").resolve().write_text("[]")
    with pytest.raises(ValueError, match="leads out of"):
        source(describe({"file_name": "parts"}))


def test_a_bad_line_in_a_folder_is_named_by_its_file(describe, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.json").write_text("{broken")
    with pytest.raises(ValueError, match="parts/a.json line 1 is not JSON"):
        load(describe({"file_name": "parts"}))


def test_keys_that_are_not_read_are_said(describe):
    folder = describe({"file_name": "a.json", "num_samples": 9, "ranking": False, "stage": "sft"}, **{"a.json": ROWS})
    assert [note.rpartition(" has ")[2] for note in read_dataset_info(folder, "x")[1]] == [
        "'num_samples', which is not read here."
    ]


# ---- queries


@pytest.mark.parametrize(("given", "expected"), [("", "问0补充"), ("\n", "问0\n补充"), (" ", "问0 补充")])
def test_the_separator_stands_between_prompt_and_query(given, expected, describe):
    assert load(describe({"file_name": "a.json"}, **{"a.json": ROWS}), query_separator=given)["prompt"][0] == expected


def test_a_line_break_may_be_typed_as_backslash_and_n():
    line = "--do_train --dataset x --model_name_or_path m --output_dir o --pre_seq_len 4 --query_separator "
    assert parse_flags(shlex.split(line + r"'\n\n'"))[1].query_separator == "\n\n"
    assert parse_flags(shlex.split(line + "''"))[1].query_separator == ""


def test_a_run_says_where_the_query_stands_and_remembers_the_separator(describe, monkeypatch, capsys):
    folder = describe({"file_name": "a.json"}, **{"a.json": ROWS})
    settings = {**TRAIN_SETTINGS, "train_file": None, "prompt_column": None, "response_column": None, "max_steps": 1}
    run(monkeypatch, settings, dataset="x", dataset_dir=folder, query_separator="", output_dir=folder / "run")
    output = capsys.readouterr().out
    assert "A query stands behind its prompt and '': --query_separator chooses" in output and "问：问0补充" in output
    assert json.loads((folder / "run" / "checkpoint-1" / "ptuning.json").read_text())["query_separator"] == ""


# ---- dialogues and pairs


@pytest.mark.parametrize("tags", [None, {"role_tag": "from", "user_tag": "human", "assistant_tag": "gpt"}])
def test_a_dialogue_of_sharegpt_is_read(tags, describe):
    folder = describe(
        {"file_name": "a.json", "formatting": "sharegpt", "tags": tags}, **{"a.json": [{"conversations": TURNS}]}
    )
    assert load(folder)[0] == {"prompt": "你好", "response": "嗨", "history": [], "row": 1}


def test_pairs_of_answers_arrive_by_their_columns(describe):
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "a.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    found = source(describe(entry, **{"a.json": [PAIR]}))
    assert (found["messages_column"], found["chosen_column"], found["rejected_column"]) == tuple(columns.values())
    with pytest.raises(ValueError, match='pairs of answers, which --stage rm and dpo.*give "response": "chosen"'):
        load_examples(**found)


def test_a_list_of_two_answers_is_for_preference_training(describe):
    rows = [{"instruction": "问", "output": ["好", "差"]}]
    with pytest.raises(
        ValueError, match="'output' .* holds a list, expected text; a pair of answers is for --stage rm"
    ):
        load(describe({"file_name": "a.json", "stage": "rm"}, **{"a.json": rows}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "a.json", "formatting": "magic"}, '"formatting" of .* expected alpaca or sharegpt'),
        ({"file_name": "a.json", "tags": {"user_tag": "人"}}, "\"tags\" of .* for 'user_tag'.*human or user"),
        ({"file_name": "a.json", "columns": {"tools": "t"}}, "'tools'; expected names of columns for prompt"),
        ({"hf_hub_url": "../a"}, "hf_hub_url is '../a'; expected owner/name"),
        ({"ms_hub_url": "/etc"}, "ms_hub_url is '/etc'; expected owner/name"),
        ({"hf_hub_url": 3}, "hf_hub_url and subset of .* must be text"),
        ({"hf_hub_url": "a/b"}, r"the hub did not give hf_hub_url 'a/b', split 'train' \(Couldn't reach .*Offline"),
        ({"script_url": "a"}, "is made by a program"),
    ],
)
def test_a_wrong_entry_is_refused(entry, message, describe):
    with pytest.raises(ValueError, match=message) as caught:
        source(describe(entry, **{"a.json": ROWS}))
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_name_of_a_hub_data_set_is_not_read(describe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected owner/name of a data set on the hub, and no file or folder"):
        source(describe({"hf_hub_url": "a/b"}))


def test_a_file_has_no_other_split_than_train(describe):
    with pytest.raises(ValueError, match="--split test: 'x' in .* is a file"):
        source(describe({"file_name": "a.json"}, **{"a.json": ROWS}), split="test")


# ---- hubs

HUBS = """
import sys
from data.dataset_info import read_dataset_info
from data.examples import load_examples
for name, split in (("hf", "train"), ("hf", "test"), ("ms", "train"), ("both", "train"), ("script", "train")):
    try:
        print(name, split, load_examples(**read_dataset_info(sys.argv[1], name, split)[0][name])[0]["prompt"][:])
    except ValueError as error:
        print(name, str(error))
"""


def test_rows_are_fetched_from_both_hubs(describe, tmp_path):
    train, test = lines(ROWS).encode(), lines(ROWS[:1]).encode()
    on_hugging_face = {"train.jsonl": train, "test.jsonl": test, "README.md": b"---\nlicense: mit\n---\n"}
    on_modelscope = {"data/train.jsonl": lines(ROWS[1:]).encode(), "dataset_infos.json": b"{}", "data/dev.jsonl": test}
    folder = describe({})
    entries = {
        "hf": {"hf_hub_url": "a/b"},
        "ms": {"ms_hub_url": "a/b"},
        "both": {"hf_hub_url": "no/such", "ms_hub_url": "a/b"},
        "script": {"hf_hub_url": "a/script"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    scripted = {"script.py": b"raise SystemExit('run')"}
    with (
        served({"a/b": on_hugging_face, "a/script": scripted}) as hub,
        served({"a/b": on_modelscope}) as scope,
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning"), "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_ENDPOINT": hub, "MODELSCOPE_DOMAIN": scope, "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
        environment |= {"USE_MODELSCOPE_HUB": "1"}
        done = subprocess.run(
            [sys.executable, "-c", HUBS, str(folder)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    *fetched, refused = done.stdout.splitlines()
    whole = "['问0\\n补充', '问1\\n补充', '问2\\n补充']"
    assert fetched == [
        f"hf train {whole}",
        "hf test ['问0\\n补充']",
        *[f"{name} train ['问1\\n补充', '问2\\n补充']" for name in ("ms", "both")],
    ], done.stderr
    assert (
        "Dataset scripts are no longer supported" in refused and "the hub did not give hf_hub_url 'a/script'" in refused
    )


def test_a_run_learns_every_answer_and_its_checkpoint_remembers_it(describe, monkeypatch, capsys):
    folder = describe(
        {"file_name": "a.json", "formatting": "sharegpt"}, **{"a.json": [{"conversations": TURNS * 2}] * 2}
    )
    settings = {**TRAIN_SETTINGS, "train_file": None, "prompt_column": None, "response_column": None, "max_steps": 1}
    run(monkeypatch, settings, dataset="x", dataset_dir=folder, train_on_history=True, output_dir=folder / "run")
    assert capsys.readouterr().out.count("嗨 </s>⟧") == 2
    assert json.loads((folder / "run" / "checkpoint-1" / "ptuning.json").read_text())["train_on_history"] is True
