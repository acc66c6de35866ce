"""sign.py: a checkpoint without a signature of its training prompts gets the one that training would have written."""

import pytest
import torch
from conftest import TINY
from support.chat_server import make_run, remember, sign
from support.finetuned import METHODS, TRAIN, run

import sign as program
from checkpoints.file_names import SIGNATURE_FILE
from tuning.signature import FEWEST_PROMPTS, read_signature

ROWS = {"max_train_samples": FEWEST_PROMPTS}  # so few that training measures them all, too
WORDS = ["--train_file", str(TRAIN["train_file"]), "--max_train_samples", str(FEWEST_PROMPTS)]


def check_equal(found, expected):
    assert found.mean == pytest.approx(expected.mean, abs=1e-5)
    assert found.threshold.item() == pytest.approx(expected.threshold.item(), rel=1e-3)


@pytest.mark.parametrize("method", ["int4 lora", "p_tuning"])
def test_it_is_the_one_that_training_would_have_written(monkeypatch, tmp_path, capsys, method):
    how = METHODS.get(method, {"pre_seq_len": 4, "source_prefix": "广告："})
    run(monkeypatch, TRAIN, output_dir=tmp_path, **ROWS, **how)
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (2, 4)]
    expected = read_signature(checkpoints[0], 128)
    asked = checkpoints[-1:] if method == "int4 lora" else checkpoints
    for checkpoint in asked:
        for file in (SIGNATURE_FILE, "checksums.json"):
            (checkpoint / file).unlink()
    name = f"{tmp_path}/all" if len(asked) > 1 else str(asked[0])
    program.look(["--ptuning_checkpoint", name, *WORDS])
    program.main(["--ptuning_checkpoint", name, *WORDS])
    for checkpoint in asked:
        check_equal(read_signature(checkpoint, 128), expected)
    assert "--auto can choose it now" in capsys.readouterr().out


def test_a_checkpoint_of_2023_is_signed_by_the_flags_that_trained_it(tmp_path):
    checkpoint = make_run(tmp_path, (4,)) / "checkpoint-10"
    (checkpoint / "ptuning.json").unlink()
    old = "--do_train --overwrite_output_dir --prompt_column content --response_column summary --max_steps 3000"
    words = [
        *old.split(),
        "--output_dir",
        str(tmp_path / "new"),
        "--model_name_or_path",
        str(TINY),
        "--pre_seq_len",
        "4",
    ]
    program.main([*words, "--ptuning_checkpoint", str(checkpoint), *WORDS])
    signature = read_signature(checkpoint, 128)
    assert signature.distance(signature.mean[None]) == pytest.approx(torch.zeros(1)) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        ({}, "checkpoint-20", "has a signature.safetensors already"),
        ({"finetuning_type": "full"}, "checkpoint-10", "needs no signature: .* this is full"),
        ({"stage": "rm"}, "checkpoint-10", "needs no signature: .* this is a reward model"),
        ({}, "checkpoint-10,{run}/checkpoint-20", "expected one checkpoint or one run"),
    ],
)
def test_what_cannot_be_signed_is_refused_before_torch_is_loaded(tmp_path, settings, name, said):
    make_run(tmp_path, (4, 4))
    sign(tmp_path / "checkpoint-20")
    remember(tmp_path / "checkpoint-10", **settings)
    with pytest.raises(ValueError, match=said):
        program.look(["--ptuning_checkpoint", f"{tmp_path}/{name.format(run=tmp_path)}", *WORDS])


def test_too_few_rows_are_refused_in_one_line(tmp_path):
    checkpoint = make_run(tmp_path, (4,)) / "checkpoint-10"
    columns = ["--prompt_column", "content", "--response_column", "summary", "--max_train_samples", "19"]
    with pytest.raises(ValueError, match="There are 19 training rows, and a signature needs at least 20"):
        program.main(["--ptuning_checkpoint", str(checkpoint), *WORDS[:2], *columns])
