"""Every field of the configuration."""

import numpy
import pytest
import torch
from conftest import OFFICIAL_FIELDS, SYNTHETIC, synthetic_model
from support.small_model import batch, generate, model  # noqa: F401, fixtures

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import Rotary, rotary_cos_sin

VARIANTS = {
    "full multi-head": {"multi_query_attention": False},
    "one group": {"multi_query_group_num": 1},
    "linear biases": {"add_bias_linear": True},
    "no qkv bias": {"add_qkv_bias": False},
    "residual after the norm": {"apply_residual_connection_post_layernorm": True},
    "no final norm": {"post_layer_norm": False},
    "layer norm": {"rmsnorm": False},
    "float32 residual": {"fp32_residual_connection": True},
    "other head size": {"kv_channels": 12},
    "projection": {"prefix_projection": True},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_architecture_variant_trains_and_decodes_with_its_cache(fields):
    model = synthetic_model(**fields)
    input_ids, labels = batch()
    loss = model(input_ids, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.transformer.prefix_encoder.parameters())
    assert generate(model) == generate(model, use_cache=False)


def test_biases_and_norms_exist_where_the_configuration_says():
    names = set(synthetic_model(add_bias_linear=True, rmsnorm=False).state_dict())
    assert "transformer.encoder.layers.0.mlp.dense_h_to_4h.bias" in names
    assert "transformer.encoder.layers.0.self_attention.dense.bias" in names
    assert "transformer.encoder.final_layernorm.bias" in names
    names = set(synthetic_model(add_qkv_bias=False, post_layer_norm=False).state_dict())
    assert not any(name.endswith("bias") or "final_layernorm" in name for name in names)


def test_float32_residual_keeps_the_stream_in_float32():
    model = synthetic_model(fp32_residual_connection=True).to(torch.bfloat16)
    dtypes = []
    for layer in model.transformer.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append((inputs[0].dtype, output.dtype)))
    model(batch()[0])
    assert dtypes == [(torch.float32, torch.float32)] * 2


def test_full_multi_head_keeps_query_key_and_value_side_by_side_within_a_head():
    model = synthetic_model(multi_query_attention=False)
    attention = model.transformer.encoder.layers[0].self_attention
    mixed = torch.arange(4 * 3 * 8.0).view(1, 1, -1)
    query_key, value = attention.split_heads(mixed)
    query, key = query_key.chunk(2, dim=1)
    assert query[0, 1, 0].tolist() == list(range(24, 32))
    assert key[0, 1, 0].tolist() == list(range(32, 40))
    assert value[0, 1, 0].tolist() == list(range(40, 48))


def test_rotary_turns_pairs_of_the_first_half_of_a_head_only():
    x = torch.randn(1, 1, 1, 8)
    cos, sin = rotary_cos_sin(torch.tensor([[3]]), ChatGLMConfig(kv_channels=8), torch.float32)
    y = Rotary.apply(x, cos, sin)
    for pair, frequency in enumerate((1.0, 0.01)):  # 10000 ** (-2 * pair / 4)
        turned = complex(*x[0, 0, 0, 2 * pair : 2 * pair + 2]) * numpy.exp(3j * frequency)
        assert y[0, 0, 0, 2 * pair : 2 * pair + 2].tolist() == pytest.approx([turned.real, turned.imag], abs=1e-6)
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize(
    "fields",
    [
        {"original_rope": False},
        {"rope_ratio": 0.5},
        {"kv_channels": 6},
        {"multi_query_group_num": 3},
        {"num_layers": 0},
        {"hidden_size": "4096"},
        {"quantization_bit": 16},
        {"tie_word_embeddings": True},
        {"prefix_dropout": 1.0},
        {"pre_seq_len": -1},
    ],
    ids=str,
)
def test_an_unsupported_configuration_value_is_an_error_that_names_it(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=name):
        ChatGLMConfig(**{**OFFICIAL_FIELDS, **SYNTHETIC["config"], **fields})


def test_more_tokens_than_the_model_was_made_for_are_refused(model):
    with pytest.raises(ValueError, match="seq_length"):
        model(torch.ones(1, model.config.seq_length + 1, dtype=torch.long))
