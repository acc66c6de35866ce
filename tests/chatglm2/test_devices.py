"""On a GPU: nothing stays behind on the CPU, and nothing makes the GPU wait that need not. With a pretended GPU."""

from collections import Counter

import pytest
import torch
from conftest import TINY, synthetic_model
from support.pretended_gpu import GPU, GPUTensor, PretendedGPU, as_a_gpu_launches, launches, transfers

from chatglm2.generation import Batch, answer_prompts, choose
from chatglm2.official_recipe import official_loss
from checkpoint import load_model, read_config
from data.batches import collate_training
from training.memory import estimate_peak_bytes
from tuning.methods import prepare_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], list(range(20, 60)), [7] * 3]


@pytest.fixture
def gpu(monkeypatch):
    with PretendedGPU(monkeypatch):
        yield


def load(bits=None, projection=False, prefix=16):
    config = read_config(TINY, pre_seq_len=prefix or None, prefix_projection=projection)
    return load_model(
        TINY, config=config, dtype=torch.bfloat16, device="cuda", quantization_bit=bits, quantization_backend="torch"
    )


def training_batch(lengths=(20, 33, 300, 41)):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        token_ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": token_ids, "labels": [-100] * 10 + token_ids[10:], "row": 1})
    batch = collate_training(rows, pad_token_id=0)
    return {name: batch[name].to("cuda") for name in ("input_ids", "labels")}


def gradients_on_the_gpu(model):
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients and all(isinstance(gradient, GPUTensor) for gradient in gradients)
    return gradients


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu):
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    assert (on_gpu + 1).device == GPU and on_cpu.to("cuda").device == GPU
    with pytest.raises(AssertionError, match="lies on the CPU"):
        on_gpu + on_cpu


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"bits": 8}, {"projection": True}], ids=str)
def test_every_weight_goes_to_the_gpu(gpu, settings):
    model = load(**settings)
    assert model.device == GPU
    assert all(isinstance(tensor, GPUTensor) for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"bits": 8}, {"projection": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_waits_for_the_gpu_once(gpu, settings, checkpointing):
    model, batch = load(**settings).train(), training_batch()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    transfers.clear()
    loss = model(**batch).loss
    loss.backward()
    assert transfers == ["from the GPU"]  # how many tokens are computed
    gradients = gradients_on_the_gpu(model)
    assert all(gradient.content.isfinite().all() and gradient.content.any() for gradient in gradients)


@pytest.mark.parametrize("finetuning_type, bits", [("lora", None), ("lora", 4), ("freeze", None)])
def test_a_step_of_the_other_methods_waits_no_more_often(gpu, finetuning_type, bits):
    model, batch = load(bits, prefix=0), training_batch()
    prepare_model(model, finetuning_type, do_train=True)
    model.train()
    transfers.clear()
    # The GPU's autocast, as C++ sees it.
    with torch.autocast("cpu", torch.bfloat16, enabled=finetuning_type == "freeze"):
        loss = model(**batch).loss
    loss.backward()
    assert transfers == ["from the GPU"]
    assert gradients_on_the_gpu(model)


@pytest.mark.parametrize("temperature, sent", [(0.0, 1), (0.9, 2)])  # tokens and lengths; what to draw
def test_a_step_of_decoding_waits_for_the_gpu_once(gpu, temperature, sent):
    model, rows = load(), len(PROMPTS)
    batch = Batch(model, rows, 16 + 64)
    batch.graphs = None  # they cannot be pretended
    batch.admit(PROMPTS, model.transformer.prefix_encoder(1, torch.bfloat16))
    transfers.clear()
    logits = batch.step([5] * rows)
    choose(logits[:, :300], [temperature] * rows, [0.8] * rows, [0.5] * rows)
    assert transfers == ["to the GPU"] * sent + ["from the GPU"]


@pytest.mark.filterwarnings("ignore:Generating without CUDA graphs")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_come_and_go_on_the_gpu(gpu, temperature):
    model = load()
    model.config.eos_token_id = -1
    answers = answer_prompts(
        model, PROMPTS, 60, num_known=300, batch_size=3, rows=range(4), temperature=temperature, top_p=0.8
    )
    assert [len(answer) for answer in answers] == [60 - len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("prefix", [16, 0])
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_prompts_are_answered_on_the_gpu(gpu, cache, prefix):
    inputs = {"input_ids": [[0, 0, 5, 6], [7, 8, 9, 10]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    inputs = {name: torch.tensor(numbers, device=GPU) for name, numbers in inputs.items()}
    model = load(prefix=prefix)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1, cache_implementation=cache)
    assert tokens.shape == (2, 8) and isinstance(tokens, GPUTensor)
    assert model(**inputs).logits.content.isfinite().all()  # those of padding, too


def test_the_official_recipe_leaves_cudnn_out_too(gpu):
    model, batch = load().train(), training_batch()
    assert official_loss(model, **batch).content.isfinite()


def test_cuda_graphs_are_a_part_of_the_memory_of_generating(gpu):
    of_generating, of_training = (
        estimate_peak_bytes(load(), batch_size=2, length=64, num_supervised=count) for count in (0, 8)
    )
    assert of_generating["graphs"] > 0 and "graphs" not in of_training


# ---- how many kernels


def launched_a_layer(work):
    """Kernels that work(model) launches for each layer, by name, and how many."""
    counts = []
    for num_layers in (1, 2):
        model = synthetic_model(num_layers=num_layers).bfloat16()
        model.transformer.prefix_encoder.float()
        model.to("cuda")
        counts.append(Counter(work(model)))
    return counts[1] - counts[0], counts[1].total() - counts[0].total()


def launched_by_training(model):
    launches.clear()
    model.train()(**training_batch((20, 33, 41))).loss.backward()
    return launches


def launched_by_a_step(model):
    batch = Batch(model, len(PROMPTS), 80)
    batch.graphs = None
    batch.admit(PROMPTS, model.transformer.prefix_encoder(1, torch.bfloat16))
    launches.clear()
    batch.step([5] * len(PROMPTS))
    return launches


@pytest.mark.parametrize("work, most", [(launched_by_training, 45), (launched_by_a_step, 12)])
def test_a_layer_launches_few_kernels(gpu, work, most, monkeypatch):
    as_a_gpu_launches(monkeypatch)
    names, count = launched_a_layer(work)
    assert count <= most, names
