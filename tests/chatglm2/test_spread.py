"""A model that is spread over devices answers as on one. Two pretended GPUs, on which tensors of both never meet, or one
and the CPU."""

import pytest
import torch
from conftest import TINY
from support.pretended_gpu import GPU, PretendedGPU, as_a_gpu_launches, halves, launches
from support.small_chatglm1 import write_folder

from chatglm2.generation import answer_prompts
from checkpoint import ChatGLMForConditionalGeneration, family_of, load_model, load_tokenizer, read_config
from checkpoints.placing import describe_places, device_of, infer_devices

PREFIX = 6


@pytest.fixture
def narrow(monkeypatch):
    """Caches that grow after few tokens."""
    monkeypatch.setattr("chatglm2.generation.WIDTH_STEP", 8)


@pytest.fixture(scope="module")
def first_generation(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("first") / "model")


def load(folder, second=None, *, prefix=PREFIX, bits=None, dtype=torch.float32):
    """The model of a folder, spread over the first GPU and a `second` device, or on the CPU."""
    config = read_config(folder, pre_seq_len=prefix)
    devices = halves(config.num_layers, second) if second else "cpu"
    how = {"quantization_bit": bits, "quantization_backend": "torch"}
    model = load_model(folder, config=config, dtype=dtype, device=devices, **how)
    model.config.eos_token_id = -1
    if prefix:
        weight = model.transformer.prefix_encoder.embedding.weight
        weight.data.copy_(torch.arange(weight.numel()).sin().view_as(weight))
    return model.eval()


def answers(model, folder, rows=2, **how):
    """Of more prompts than rows, so that rows come and go and the cache grows."""
    tokenizer = load_tokenizer(folder, read_config(folder))
    prompts = [tokenizer.encode_prompt(text) for text in ("你好", "类型#裙*颜色#黑色", "a")]
    return answer_prompts(
        model, prompts, 64, num_known=300, batch_size=rows, rows=range(3), max_answer=9, seed=3, **how
    )


def logits_and_loss(model):
    ids = torch.arange(5, 25, device=model.device).view(2, 10)
    with torch.no_grad():
        output = model(ids, labels=ids)
    return [number.content if hasattr(number, "content") else number for number in (output.logits, output.loss)]


def close(found, expected, bound=1e-5):
    return all(
        (one - other).abs().max() <= bound * other.abs().max() for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("second, bits", [("cuda:1", None), ("cuda:1", 4), ("cpu", None)])
def test_logits_loss_and_answers_are_those_of_one_device(narrow, monkeypatch, second, bits):
    alone = load(TINY, bits=bits)
    expected, told = logits_and_loss(alone), answers(alone, TINY, temperature=0.9)
    with PretendedGPU(monkeypatch) as gpus:
        spread = load(TINY, second, bits=bits)
        assert spread.device == GPU
        assert {layer.mlp.dense_4h_to_h.weight.device for layer in spread.transformer.encoder.layers} == {
            GPU,
            torch.device(second),
        }
        assert close(logits_and_loss(spread), expected)
        assert answers(spread, TINY, temperature=0.9) == told
        assert gpus.current == 0
    assert describe_places(spread).startswith(f"Layers 0 to 1 on cuda:0, 2 to 3 on {second}.")


def test_a_part_may_lie_elsewhere_than_what_it_is_a_part_of(narrow, monkeypatch):
    expected = logits_and_loss(load(TINY, prefix=None))
    places = {"": "cuda:0", "transformer.encoder.layers.1": "cuda:1"}
    with PretendedGPU(monkeypatch):
        spread = ChatGLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, device_map=places)
        assert spread.layer_devices == [GPU, torch.device("cuda", 1), GPU, GPU]
        assert close(logits_and_loss(spread), expected)
        alone = answers(load(TINY, "cuda:0", prefix=None), TINY)
        spread.config.eos_token_id = -1
        assert answers(spread.eval(), TINY) == alone


def test_a_layer_that_is_torn_apart_is_an_error_that_names_it():
    places = {"": "cuda:0", "transformer.encoder.layers.2.mlp": "cuda:1"}
    with pytest.raises(ValueError, match=r"puts transformer\.encoder\.layers\.2 on cuda:0 and cuda:1; give it one"):
        load_model(TINY, device=places)


def test_chatglm_6b_answers_from_two_devices(narrow, monkeypatch, first_generation):
    alone = load(first_generation, bits=8)
    told = answers(alone, first_generation)
    with PretendedGPU(monkeypatch):
        assert answers(load(first_generation, "cuda:1", bits=8), first_generation) == told


def test_half_precision_and_the_kernels_of_a_step_are_spread_too(narrow, monkeypatch):
    with PretendedGPU(monkeypatch):
        as_a_gpu_launches(monkeypatch)
        alone = load(TINY, "cuda:0", dtype=torch.bfloat16)
        told = answers(alone, TINY)
        launches.clear()
        assert answers(load(TINY, "cuda:1", dtype=torch.bfloat16), TINY) == told
        assert "attend_step" in launches


def test_generate_with_beams_and_shown_attention_takes_both_devices(monkeypatch):
    alone = load(TINY)
    ids = torch.arange(5, 25).view(2, 10)
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with torch.no_grad():
        expected = [alone.generate(ids, **how), *alone(ids, output_attentions=True).attentions]
    with PretendedGPU(monkeypatch), torch.no_grad():
        spread = load(TINY, "cuda:1")
        found = [spread.generate(ids.to("cuda"), **how), *spread(ids.to("cuda"), output_attentions=True).attentions]
        assert len(found) == len(expected) and close([tensor.content for tensor in found], expected)


@pytest.mark.parametrize(
    "room, devices",
    [
        ({0: 10**9, 1: 10**9, "cpu": 10**9}, {0: [0], 1: [1, 2, 3]}),
        ({0: 10**9, "cpu": 10**9}, {0: [0, 1, 2, 3]}),
        ({0: 4 * 10**6, "cpu": 10**9}, {0: [0], "cpu": [1, 2, 3]}),
    ],
    ids=str,
)
def test_auto_fills_the_gpus_and_then_the_cpu(monkeypatch, room, devices):
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda memory=None: dict(memory or room))
    config = read_config(TINY, pre_seq_len=PREFIX)
    with torch.device("meta"):
        model = family_of(config).model_class(config)
    places = infer_devices(model, "auto", torch.float32)
    if len(devices) == 1:
        assert places == GPU
        return
    found = {}
    for layer in range(4):
        place = device_of(f"transformer.encoder.layers.{layer}", places)
        found.setdefault(place.index if place.type == "cuda" else "cpu", []).append(layer)
    assert found == devices
    assert device_of("transformer.prefix_encoder.embedding.weight", places) == GPU
