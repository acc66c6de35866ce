"""Number formats of a run, as far as no GPU is needed to see them."""

from types import SimpleNamespace

import torch

from checkpoint import choose_device, choose_dtype
from training.precision import set_precision


def test_an_apple_gpu_answers_in_float16_and_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == ("cuda" if torch.cuda.is_available() else "mps")
    assert choose_dtype("mps")[0] == torch.float16
    for trains, expected in ((True, torch.float32), (False, torch.float16)):
        flags = dict.fromkeys("fp16 bf16 fp16_full_eval bf16_full_eval deepspeed".split(), False)
        args = SimpleNamespace(**flags, device=torch.device("mps"), precision="auto", do_train=trains)
        assert set_precision(args, "p_tuning")[0] == expected and not args.fp16


def test_weights_on_a_cpu_are_float32_unless_bfloat16_is_asked_for():
    assert choose_dtype("cpu")[0] == choose_dtype("cpu", fp16=True)[0] == torch.float32
    assert choose_dtype("cpu", bf16=True)[0] == torch.bfloat16


def test_bfloat16_on_a_cpu_that_does_not_multiply_it_is_called_slow(monkeypatch):
    for multiplies, expected in ((True, "--bf16"), (False, "--bf16, slow: this processor has no instructions for it")):
        monkeypatch.setattr("checkpoint.MULTIPLIES_BFLOAT16", multiplies)
        assert choose_dtype("cpu", bf16=True) == (torch.bfloat16, expected)
