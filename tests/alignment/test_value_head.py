"""The value head: its file, ChatGLM-Efficient-Tuning's, and what is refused."""

import pytest
import torch
from conftest import TINY

from alignment.value_head import ValueHead, read_value_head, save_value_head
from common.files import write_json


def random_head(size=8):
    head = ValueHead(size)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.bias)
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_computes_in_float32_and_comes_back_as_it_was(tmp_path, dtype):
    head, hidden = random_head(), torch.randn(3, 5, 8, dtype=dtype)
    save_value_head(head, tmp_path)
    write_json(tmp_path / "ptuning.json", {"stage": "rm"})
    again = read_value_head(tmp_path, 8)
    assert again(hidden).dtype == torch.float32 and again(hidden).shape == (3, 5)
    torch.testing.assert_close(again(hidden), head(hidden))
    assert not again.before_norm


@pytest.mark.parametrize("prefix", ["", "v_head."])
def test_a_head_of_chatglm_efficient_tuning_gives_its_values(tmp_path, prefix):
    linear, hidden = torch.nn.Linear(8, 1), torch.randn(4, 8)
    tensors = {f"{prefix}summary.weight": linear.weight.detach(), f"{prefix}summary.bias": linear.bias.detach()}
    torch.save(tensors, tmp_path / "value_head.bin")
    head = read_value_head(tmp_path, 8)
    torch.testing.assert_close(head(hidden), linear(hidden)[:, 0])
    assert head.before_norm  # what output_hidden_states of the official code gives last


def test_the_file_is_one_that_chatglm_efficient_tuning_reads(tmp_path):
    head, hidden = random_head(), torch.randn(4, 8)
    save_value_head(head, tmp_path)
    tensors = torch.load(tmp_path / "value_head.bin", weights_only=True)
    values = torch.nn.functional.linear(hidden, tensors["summary.weight"], tensors["summary.bias"])
    torch.testing.assert_close(values[:, 0], head(hidden))


def test_what_is_no_head_of_this_model_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no reward model: there is no value_head\.bin"):
        read_value_head(TINY, 8)
    save_value_head(random_head(), tmp_path)
    with pytest.raises(ValueError, match="does not fit this base model: .*another size"):
        read_value_head(tmp_path, 16)
    torch.save(
        {"summary.weight": torch.full((1, 8), float("nan")), "summary.bias": torch.zeros(1)},
        tmp_path / "value_head.bin",
    )
    with pytest.raises(ValueError, match="holds nan"):
        read_value_head(tmp_path, 8)
