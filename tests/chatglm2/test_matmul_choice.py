"""Which library multiplies on a CPU: measured once a machine, kept, pinned by PTUNING_MATMUL."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from chatglm2 import matmul, matmul_choice
from chatglm2.matmul import ONEDNN, multiply
from chatglm2.matmul_choice import ROWS, decisions, measure, mkl_is_faster

KINDS = 2 * len(ROWS)
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this processor has no AVX, where torch's own product stays")


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch, tmp_path):
    monkeypatch.delenv("PTUNING_MATMUL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decisions.cache_clear()
    yield tmp_path / "chatglm2-ptuning" / "matmul.json"
    decisions.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    calls = []

    def counted():
        calls.append("measured")
        return ["mkl"] * KINDS

    monkeypatch.setattr(matmul_choice, "measure", counted)
    return calls


def test_a_machine_is_measured_once(nothing_decided, measured):
    for _ in range(2):
        decisions.cache_clear()
        assert decisions(2) == ["mkl"] * KINDS
    assert len(measured) == 1
    assert list(json.loads(nothing_decided.read_text()).values()) == [["mkl"] * KINDS]


def test_another_number_of_threads_is_measured_on_its_own(nothing_decided, measured):
    decisions(1), decisions(2)
    assert len(measured) == 2 and len(json.loads(nothing_decided.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": ["mkl"]}', '{"a": "mkl"}', "\x00\xff"])
def test_a_damaged_file_is_measured_again_and_replaced(content, nothing_decided, measured):
    nothing_decided.parent.mkdir()
    nothing_decided.write_text(content)
    assert decisions(2) == ["mkl"] * KINDS
    assert ["mkl"] * KINDS in json.loads(nothing_decided.read_text()).values()


def test_an_entry_that_is_not_whole_is_measured_again(nothing_decided, measured):
    decisions(2)
    (key,) = json.loads(nothing_decided.read_text())
    for broken in (["mkl"], "mkl", ["mkl"] * (KINDS - 1) + ["other"], None):
        nothing_decided.write_text(json.dumps({key: broken}))
        decisions.cache_clear()
        assert decisions(2) == ["mkl"] * KINDS


def test_where_nothing_can_be_kept_each_process_measures(monkeypatch, measured, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert decisions(2) == ["mkl"] * KINDS and len(measured) == 1


@pytest.mark.parametrize("name", ["mkl", "onednn"])
def test_the_variable_pins_the_library_without_measuring(name, monkeypatch, measured, nothing_decided):
    monkeypatch.setenv("PTUNING_MATMUL", name)
    assert decisions(2) == [name] * KINDS
    assert not measured and not nothing_decided.exists()


def test_another_name_in_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("PTUNING_MATMUL", "blas")
    with pytest.raises(ValueError, match="PTUNING_MATMUL=blas: expected mkl or onednn"):
        decisions(2)


@needs_onednn
def test_the_shorter_time_decides_for_each_kind_of_product():
    now, calls = [0.0], [0]
    fast = ["mkl", "onednn", "mkl", "onednn", "onednn", "mkl"]

    def clock():  # called before and after each product: oneDNN's, then MKL's, by turns
        calls[0] += 1
        if calls[0] % 2 == 0:
            product = calls[0] // 2 - 1
            kind = product // (2 * matmul_choice.REPEATS)
            now[0] += 1.0 if ("onednn", "mkl")[product % 2] == fast[kind] else 2.0
        return now[0]

    assert measure(clock) == fast


def test_the_kind_is_told_by_the_rows_and_by_how_the_weight_lies(monkeypatch):
    kinds = ["mkl", "onednn", "onednn", "onednn", "onednn", "mkl"]
    monkeypatch.setattr(matmul_choice, "measure", lambda: kinds)
    weight = torch.ones(6, 4)
    assert [mkl_is_faster(count, weight) for count in (1, 8, 9, 64, 65)] == [True, True, False, False, False]
    columns = torch.ones(4, 6).t()
    assert [mkl_is_faster(count, columns) for count in (8, 64, 65, 4096)] == [False, False, True, True]


@needs_onednn
@pytest.mark.parametrize("name", ["mkl", "onednn"])
@pytest.mark.parametrize("rows", [1, 8, 20, 100])
def test_either_library_gives_the_product(name, rows, monkeypatch):
    monkeypatch.setenv("PTUNING_MATMUL", name)
    used = []
    monkeypatch.setattr(matmul, "onednn", lambda *arguments: used.append(1) or matmul_choice.onednn(*arguments))
    x, weight = torch.randn(rows, 48), torch.randn(80, 48)
    expected = F.linear(x.double(), weight.double()).float()
    torch.testing.assert_close(multiply(x, weight), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(multiply(x, weight.t().contiguous().t()), expected, rtol=1e-5, atol=1e-5)
    assert bool(used) == (name == "onednn")


@needs_onednn
def test_debug_shows_what_was_decided(monkeypatch, nothing_decided, measured):
    from training.precision import describe_precision

    args = SimpleNamespace(precision="auto", device=torch.device("cpu"))
    assert "\n" not in describe_precision(torch.float32, "no GPU", args)
    monkeypatch.setenv("PTUNING_TRACEBACK", "1")
    _, head, *lines = describe_precision(torch.float32, "no GPU", args).split("\n")
    assert head.split() == "float32 products rows contiguous columns contiguous".split()
    assert [line.split()[-2:] for line in lines] == [["mkl", "mkl"]] * len(ROWS)
    assert "\n" not in describe_precision(torch.bfloat16, "the GPU has it", args)
