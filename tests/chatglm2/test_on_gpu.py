"""What only a real GPU can show: graphs, threads beside them, half precision with padding, kernels at full size."""

import threading

import pytest
import torch
from conftest import TINY, relative_difference, synthetic_model
from support.pretended_gpu import halves

from chatglm2 import kernels
from chatglm2.generation import Batch
from checkpoint import load_model, read_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = [[5, 6, 7], [8], list(range(20, 60)), [7] * 9, [9, 10], [11, 12, 13, 14], [15], [16, 17]]


@pytest.fixture(scope="module")
def model():
    model = synthetic_model().bfloat16()
    model.transformer.prefix_encoder.float()
    return model.to("cuda")


def logits_of_steps(model, rows, graphs):
    batch = Batch(model, rows, 100)
    if not graphs:
        batch.graphs = None
    with torch.inference_mode():
        prefix = model.transformer.prefix_encoder(1, torch.bfloat16)
    batch.admit(PROMPTS[:rows], prefix)
    logits = [batch.step([token] * rows).float().cpu() for token in (30, 31, 32)]
    assert not graphs or batch.graphs
    return torch.stack(logits)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_graph_gives_the_logits_of_the_same_step_without(model, rows):
    assert relative_difference(logits_of_steps(model, rows, True), logits_of_steps(model, rows, False)) < 1e-2


def test_another_threads_calls_break_no_recording(model):
    stop = threading.Event()

    def load_prefixes():
        while not stop.is_set():
            torch.randn(1000).to("cuda").sum().item()

    thread = threading.Thread(target=load_prefixes)
    thread.start()
    try:
        logits_of_steps(model, 5, graphs=True)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("second", ["cpu", "cuda:1"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_spread_model_decodes_as_on_one_device(second, bits):
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = []
    for device in ("cuda", halves(4, second)):
        torch.manual_seed(0)  # of the prefix
        how = {"dtype": torch.bfloat16, "device": device, "quantization_bit": bits}
        model = load_model(TINY, config=read_config(TINY, pre_seq_len=4), **how)
        found.append(logits_of_steps(model, 8, graphs=False))
    assert relative_difference(found[1], found[0]) < 2e-2


@pytest.mark.parametrize("settings", [{}, {"pre_seq_len": None}], ids=["prefix", "base"])
def test_left_padding_changes_no_answer_in_half_precision(settings):
    model = synthetic_model(**settings).bfloat16().to("cuda")
    ids, mask = torch.zeros(2, 40, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS[1:3]):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        logits = model(**{name: tensor.cuda() for name, tensor in inputs.items()}).logits
        alone = model(input_ids=ids[:1, -1:].cuda()).logits
    assert logits.isfinite().all()
    assert relative_difference(logits[0, -1].cpu(), alone[0, -1].cpu()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_fused_kernel_passes_its_trial_at_full_size(dtype, recwarn):
    chosen = kernels.chosen(torch.device("cuda", 0), dtype)
    assert not [str(warning.message) for warning in recwarn if "Left to torch" in str(warning.message)]
    assert chosen.swiglu and chosen.attend_step
