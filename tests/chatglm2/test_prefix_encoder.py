"""Virtual tokens -> one (key, value) pair per layer and KV group."""

import torch
from conftest import OFFICIAL_FIELDS, SYNTHETIC

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.prefix_encoder import PrefixEncoder


def make(**fields):
    torch.manual_seed(0)
    return PrefixEncoder(ChatGLMConfig(**{**OFFICIAL_FIELDS, **SYNTHETIC["config"], **fields}))


def test_prefix_has_one_key_and_one_value_per_layer_and_group():
    prefix = make()(batch_size=3, dtype=torch.float32)
    assert len(prefix) == 2
    assert all(key.shape == value.shape == (3, 2, 6, 8) for key, value in prefix)


def test_prefix_lies_in_the_official_order():
    encoder = make().eval()
    row = encoder.embedding.weight[4]  # virtual token 4: [layer][key, value][group][channel]
    layers = row.view(2, 2, 2, 8)
    for layer, (key, value) in enumerate(encoder(1, torch.float32)):
        assert torch.equal(key[0, :, 4], layers[layer, 0])
        assert torch.equal(value[0, :, 4], layers[layer, 1])


def test_names_and_shapes_are_the_official_ones():
    shapes = {name: tuple(tensor.shape) for name, tensor in make(prefix_projection=True).state_dict().items()}
    assert shapes == {
        "embedding.weight": (6, 64),
        "trans.0.weight": (32, 64),
        "trans.0.bias": (32,),
        "trans.2.weight": (64, 32),
        "trans.2.bias": (64,),
    }
    assert set(make().state_dict()) == {"embedding.weight"}


def test_dropout_differs_between_rows_while_training_and_is_off_otherwise():
    encoder = make(prefix_dropout=0.5)
    first, second = encoder.train()(2, torch.float32)[0][0]
    assert not torch.equal(first, second)
    assert torch.equal(*encoder.eval()(2, torch.float32)[0][0])


def test_dropped_share_is_the_configured_one_and_the_rest_is_scaled_up():
    encoder = make(prefix_dropout=0.25).train()
    keys = torch.stack([key for key, _ in encoder(200, torch.float32)])
    assert abs((keys == 0).float().mean().item() - 0.25) < 0.01
    kept = make(prefix_dropout=0.25).eval()(200, torch.float32)
    kept = torch.stack([key for key, _ in kept])
    assert torch.allclose(keys[keys != 0], kept[keys != 0] / 0.75)


def test_parameters_are_float32_and_the_output_is_cast():
    encoder = make(prefix_projection=True)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert encoder(1, torch.bfloat16)[0][0].dtype == torch.bfloat16


def test_autocast_does_not_lower_the_precision_of_the_projection():
    encoder = make(prefix_projection=True).eval()
    expected = encoder(1, torch.float32)[1][1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(1, torch.float32)[1][1], expected)


def test_initial_embedding_is_standard_normal_as_in_the_official_code():
    weight = make(pre_seq_len=500, seq_length=500).embedding.weight
    assert abs(weight.mean().item()) < 0.02
    assert abs(weight.std().item() - 1) < 0.02
