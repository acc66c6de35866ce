"""The transformer, its loss, and generate(): equal to the official code's figures, and to itself."""

import json

import numpy
import pytest
import torch
from conftest import OFFICIAL_FIELDS, SYNTHETIC, formula_model, relative_difference, synthetic_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm2.chat import unknown_token_ids
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.loss import SupervisedLoss, supervised_loss
from chatglm2.matmul import ONEDNN, round_rows
from chatglm2.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    NormProduct,
    OutputLayer,
    Rotary,
    SwiGLU,
    rotary_cos_sin,
)
from pretrained import register_auto_classes

register_auto_classes()

LEFT_PADDED = {
    name: torch.tensor(SYNTHETIC["left_padded"][name]) for name in ("input_ids", "attention_mask", "position_ids")
}
ENDLESS = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def model():
    return synthetic_model()


@pytest.fixture(scope="module")
def base():
    return synthetic_model(pre_seq_len=None)


def generate(model, **settings):
    inputs = {**LEFT_PADDED, **{key: settings.pop(key) for key in list(settings) if key in LEFT_PADDED}}
    inputs = {key: value for key, value in inputs.items() if value is not None}
    output = model.generate(**inputs, **{**ENDLESS, **settings})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


# ---- equal to the official code, wherever the tests run


def batch():
    return torch.tensor(SYNTHETIC["input_ids"]), torch.tensor(SYNTHETIC["labels"])


def test_loss_is_the_official_one(model, base):
    input_ids, labels = batch()
    assert model(input_ids, labels=labels).loss.item() == pytest.approx(SYNTHETIC["loss"], rel=2e-5)
    assert base(input_ids, labels=labels).loss.item() == pytest.approx(SYNTHETIC["loss_no_prefix"], rel=2e-5)


def test_hidden_states_are_the_official_ones(model):
    hidden_states = model.transformer(batch()[0]).last_hidden_state
    expected = torch.tensor(SYNTHETIC["final_hidden_row0"]).view(SYNTHETIC["final_hidden_shape"])
    assert relative_difference(hidden_states[0], expected) < 1e-4


def test_prefix_gradient_is_the_official_one(model):
    input_ids, labels = batch()
    model.zero_grad()
    model(input_ids, labels=labels).loss.backward()
    expected = torch.tensor(SYNTHETIC["prefix_grad"]).view(SYNTHETIC["prefix_grad_shape"])
    assert relative_difference(model.transformer.prefix_encoder.embedding.weight.grad, expected) < 2e-4


def test_logits_of_left_padded_prompts_are_the_official_ones(model):
    logits = model(**LEFT_PADDED).logits[:, -1]
    assert relative_difference(logits, SYNTHETIC["left_padded"]["last_logits"]) < 2e-4


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"position_ids": None}, {"num_beams": 1}],
    ids=str,
)
def test_greedy_tokens_are_the_official_ones_with_every_cache(model, base, settings):
    assert generate(model, **settings) == SYNTHETIC["left_padded"]["greedy_10"]["prefix"]
    assert generate(base, **settings) == SYNTHETIC["left_padded"]["greedy_10"]["base"]


# ---- equal to the official code on real rows and the real vocabulary


@pytest.fixture(scope="module", params=["public_mqa", "public_projection"])
def golden(request, shared):
    """(reference JSON, reference arrays, model) of one reference case."""
    reference = json.loads((shared / "golden" / f"forward.{request.param}.json").read_text())
    arrays = numpy.load(shared / "golden" / f"forward.{request.param}.npz")
    config = json.loads((shared / "chatglm2-tokenizer" / "chatglm2-6b.config.json").read_text())
    return reference, arrays, formula_model({**config, **reference["config"]})


def golden_batch(arrays):
    return torch.from_numpy(arrays["input_ids"]).long(), torch.from_numpy(arrays["labels"]).long()


def test_golden_forward_loss_and_prefix_gradients(golden):
    reference, arrays, model = golden
    input_ids, labels = golden_batch(arrays)
    model.zero_grad()
    loss = model(input_ids, labels=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(reference["loss"], rel=2e-5)
    assert relative_difference(model.transformer(input_ids).last_hidden_state, arrays["final_hidden"]) < 1e-4
    for name, parameter in model.transformer.prefix_encoder.named_parameters():
        assert relative_difference(parameter.grad, arrays[f"grad.{name}"]) < 2e-4, name


def test_golden_logits(golden):
    reference, arrays, model = golden
    input_ids, labels = golden_batch(arrays)
    with torch.no_grad():
        first_answer = (labels != -100).int().argmax(dim=1) - 1  # the position that predicts the first answer token
        logits = {"logits_first_answer": model(input_ids).logits[torch.arange(len(labels)), first_answer]}
        prompts = {k: torch.tensor(reference["generate"][k]) for k in ("input_ids", "attention_mask", "position_ids")}
        logits["logits_left_padded_last.prefix"] = model(**prompts).logits[:, -1]
    for name, value in logits.items():
        assert relative_difference(value[:, ::16], arrays[f"{name}.every16"]) < 2e-4, name
        assert relative_difference(value.logsumexp(-1), arrays[f"{name}.logsumexp"]) < 2e-5, name
        assert value.argmax(-1).tolist() == arrays[f"{name}.argmax"].tolist(), name


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=str)
def test_golden_greedy_tokens(golden, settings):
    reference = golden[0]["generate"]
    model = golden[2]
    prompts = {k: torch.tensor(reference[k]) for k in ("input_ids", "attention_mask", "position_ids")}
    forbidden = list(range(reference["forbidden_ids_from"], model.config.padded_vocab_size))
    output = model.generate(
        **prompts, do_sample=False, max_new_tokens=reference["max_new_tokens"], suppress_tokens=forbidden, **settings
    )
    assert output[:, prompts["input_ids"].shape[1] :].tolist() == reference["greedy"]["prefix"]


def test_golden_trajectory_of_twelve_optimizer_steps(golden):
    reference, arrays, model = golden
    input_ids, labels = golden_batch(arrays)
    steps = reference["trajectory"]["steps"]
    start = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=reference["learning_rate"], eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    assert losses == pytest.approx(reference["trajectory"]["loss"], abs=2e-3)
    assert norms == pytest.approx(reference["trajectory"]["grad_norm"], abs=2e-3)


def test_parameter_names_are_those_of_the_6b_checkpoint(shared):
    names = set(json.loads((shared / "golden" / "weight_names.json").read_text())["weight_map"])
    config = json.loads((shared / "chatglm2-tokenizer" / "chatglm2-6b.config.json").read_text())
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    assert set(model.state_dict()) == names - {"transformer.rotary_pos_emb.inv_freq"}


# ---- properties


def test_right_padding_never_changes_a_loss(model):
    input_ids, labels = batch()
    padded_ids = torch.nn.functional.pad(input_ids, (0, 13), value=0)
    padded_labels = torch.nn.functional.pad(labels, (0, 13), value=-100)
    assert torch.allclose(model(input_ids, labels=labels).loss, model(padded_ids, labels=padded_labels).loss, rtol=1e-6)


def test_left_padding_never_changes_a_logit(model, base):
    row = 2
    length = int(LEFT_PADDED["attention_mask"][row].sum())
    for network in (model, base):
        alone = network(LEFT_PADDED["input_ids"][row : row + 1, -length:]).logits[0]
        padded = network(**LEFT_PADDED).logits[row, -length:]
        assert relative_difference(padded, alone.detach()) < 1e-5


def test_decoding_with_a_cache_equals_one_full_forward(model, base):
    input_ids = batch()[0]
    for network in (model, base):
        full = network(input_ids).logits
        cache = DynamicCache(config=network.config)
        parts = [network(part, past_key_values=cache, use_cache=True).logits for part in input_ids.split([7, 1, 12], 1)]
        assert relative_difference(torch.cat(parts, dim=1), full.detach()) < 1e-5


def test_batch_of_one_equals_batch_of_many_token_for_token(model):
    together = generate(model)
    for row, tokens in enumerate(together):
        start = 20 - int(LEFT_PADDED["attention_mask"][row].sum())
        alone = generate(
            model, input_ids=LEFT_PADDED["input_ids"][row : row + 1, start:], attention_mask=None, position_ids=None
        )
        assert alone == [tokens]


def test_beam_search_is_the_same_with_and_without_cache(model):
    assert generate(model, num_beams=3) == generate(model, num_beams=3, use_cache=False)


def test_sampling_is_the_same_with_every_cache(model):
    samples = []
    for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(1)
        samples.append(generate(model, do_sample=True, num_return_sequences=2, **settings))
    assert samples[0] == samples[1] == samples[2]


def test_a_returned_cache_continues_where_it_ended(model):
    first = batch()[0][:1]
    settings = {**ENDLESS, "max_new_tokens": 4, "return_dict_in_generate": True}
    output = model.generate(first, **settings)
    more = torch.tensor([[5, 9, 77]])
    full = torch.cat((output.sequences, more), dim=1)
    continued = model.generate(full, past_key_values=output.past_key_values, **settings)
    assert continued.sequences.tolist() == model.generate(full, **settings).sequences.tolist()


def test_a_static_cache_of_the_users_own_can_be_reused(model):
    cache = StaticCache(config=model.config, max_cache_len=60)
    first = generate(model, past_key_values=cache)
    cache.reset()
    assert generate(model, past_key_values=cache) == first == generate(model)


def test_gradient_checkpointing_changes_no_gradient():
    input_ids, labels = batch()
    gradients = []
    for checkpointing in (False, True):
        model = synthetic_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids, labels=labels).loss.backward()
        gradients.append(model.transformer.prefix_encoder.embedding.weight.grad)
    assert torch.equal(*gradients)


def test_only_the_prefix_encoder_receives_gradients(model):
    input_ids, labels = batch()
    model.zero_grad()
    model(input_ids, labels=labels).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "transformer.prefix_encoder.embedding.weight"
    }


def test_prompt_positions_do_not_contribute_to_the_loss(model):
    input_ids, labels = batch()
    logits = model(input_ids).logits
    kept = [(row, place) for row, place in (labels[:, 1:] != -100).nonzero().tolist()]
    by_hand = [torch.nn.functional.cross_entropy(logits[r, p], labels[r, p + 1]) for r, p in kept]
    assert model(input_ids, labels=labels).loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_losses_of_micro_batches_add_up_to_the_mean_over_all_tokens(model):
    input_ids, labels = batch()
    count = (labels[:, 1:] != -100).sum()
    parts = [model(input_ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
    assert sum(parts).item() == pytest.approx(SYNTHETIC["loss"], rel=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_blank_rows_adds_nothing_to_loss_and_gradient(training):
    # What a process has at the end of an epoch, when the others have the last rows.
    model = synthetic_model().train(training)
    labels = torch.full((2, 8), -100)
    loss = model(torch.zeros(2, 8, dtype=torch.int64), labels=labels, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss.item() == 0
    gradient = model.transformer.prefix_encoder.embedding.weight.grad
    assert gradient is not None and (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_prefix_gradient_and_loss_in_float32(dtype):
    model = synthetic_model()
    model.to(dtype)
    model.transformer.prefix_encoder.float()
    input_ids, labels = batch()
    output = model(input_ids, labels=labels)
    output.loss.backward()
    gradient = model.transformer.prefix_encoder.embedding.weight.grad
    assert output.loss.dtype == output.logits.dtype == gradient.dtype == torch.float32
    assert output.loss.item() == pytest.approx(SYNTHETIC["loss"], rel=0.01)
    expected = torch.tensor(SYNTHETIC["prefix_grad"]).view(SYNTHETIC["prefix_grad_shape"])
    assert relative_difference(gradient, expected) < 0.1


# ---- what training does differently: equal to the plain operations


def losses_and_gradients(model, **batch):
    """Loss and prefix gradient of a batch."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), model.transformer.prefix_encoder.embedding.weight.grad


def ragged_batch():
    """Rows of 20, 13 and 8 tokens, padded on the right to 24; the last row ends in tokens without labels."""
    input_ids, labels = (torch.nn.functional.pad(tensor, (0, 4)) for tensor in batch())
    lengths = torch.tensor([[20], [13], [8]])
    labels = labels.masked_fill(torch.arange(24)[None] >= lengths, -100)
    labels[2, :5] = labels[2, 7] = -100
    labels[2, 6] = 9
    return input_ids, labels


def test_training_skips_padding_and_gets_the_same_loss_and_gradient(model):
    input_ids, labels = ragged_batch()
    loss, gradient = losses_and_gradients(model, input_ids=input_ids, labels=labels)
    tokens = []
    hook = model.transformer.encoder.layers[0].mlp.dense_4h_to_h.register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].shape[:-1].numel())
    )
    trained_loss, trained_gradient = losses_and_gradients(model.train(), input_ids=input_ids, labels=labels)
    hook.remove()
    model.eval()
    assert trained_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(trained_gradient, gradient) < 1e-5
    assert tokens == [round_rows(19 + 12 + 6)]  # up to the token that predicts the last label
    assert tokens[0] < input_ids.numel()


@pytest.mark.parametrize("block", [1, 5, 23])
@pytest.mark.parametrize("onednn", [True, False])  # rows without padding through LongAttention, or not
def test_queries_attended_for_in_blocks_give_the_same_numbers(model, block, onednn, monkeypatch):
    input_ids, labels = ragged_batch()
    expected = losses_and_gradients(model.train(), input_ids=input_ids, labels=labels)
    padded_logits = model.eval()(**LEFT_PADDED).logits
    tokens = generate(model, cache_implementation="static")
    monkeypatch.setattr("chatglm2.attention.QUERY_BLOCK", block)
    monkeypatch.setattr("chatglm2.matmul.ONEDNN", onednn and ONEDNN)
    loss, gradient = losses_and_gradients(model.train(), input_ids=input_ids, labels=labels)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert relative_difference(gradient, expected[1]) < 1e-5
    real = LEFT_PADDED["attention_mask"].bool()
    assert relative_difference(model.eval()(**LEFT_PADDED).logits[real], padded_logits[real]) < 1e-5
    assert generate(model, cache_implementation="static") == tokens


def test_keys_behind_a_block_of_queries_are_not_multiplied(model, monkeypatch):
    monkeypatch.setattr("chatglm2.attention.QUERY_BLOCK", 8)
    monkeypatch.setattr("chatglm2.matmul.ONEDNN", False)
    attention, keys = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, *rest: (keys.append(key.shape[2]), attention(query, key, *rest))[1],
    )
    model(torch.arange(20)[None])
    assert keys[:3] == [model.prefix_length + tokens for tokens in (8, 16, 20)]


def test_a_batch_without_any_label_costs_nothing_and_moves_nothing(model):
    input_ids, labels = batch()
    labels = torch.full_like(labels, -100)
    loss, gradient = losses_and_gradients(model.train(), input_ids=input_ids, labels=labels, num_items_in_batch=7)
    model.eval()
    assert loss == 0
    assert gradient.abs().sum() == 0


def plain_loss(hidden_states, weight, targets):
    logits = torch.nn.functional.linear(hidden_states, weight).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
def test_the_chunked_loss_and_its_gradients_are_those_of_the_plain_one(dtype, bound, monkeypatch):
    monkeypatch.setattr("chatglm2.loss.loss_rows", lambda device_type: 4)
    torch.manual_seed(0)
    hidden_states = torch.randn(10, 16).to(dtype)
    weight = (0.3 * torch.randn(50, 16)).to(dtype)
    targets = torch.randint(0, 50, (10,))
    results = []
    for loss_function, number_type in ((plain_loss, torch.float32), (SupervisedLoss.apply, dtype)):
        leaves = [tensor.to(number_type).requires_grad_() for tensor in (hidden_states, weight)]
        loss = loss_function(*leaves, targets)
        (loss / 7).backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for plain, chunked in zip(*results, strict=True):
        assert relative_difference(chunked, plain) < bound


def test_float16_keeps_the_gradient_of_small_probabilities():
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(65024, 8)).half()  # every probability is near 1.5e-5, float16's small numbers
    hidden_states, targets = torch.randn(4, 8).half().requires_grad_(), torch.tensor([0, 1, 2, 3])
    SupervisedLoss.apply(hidden_states, weight, targets).backward()
    wide = hidden_states.detach().float().requires_grad_()
    plain_loss(wide, weight.float(), targets).backward()
    assert relative_difference(hidden_states.grad, wide.grad) < 1e-3


def test_a_frozen_output_layer_gets_no_gradient_and_a_trained_one_does(model):
    input_ids, labels = batch()
    hidden_states = model.transformer(input_ids).last_hidden_state.detach().requires_grad_()
    layer = OutputLayer(hidden_states.shape[-1], model.config.padded_vocab_size, bias=False)
    for trained in (False, True):
        layer.weight.requires_grad_(trained)
        supervised_loss(hidden_states, labels, layer).backward()
        assert (layer.weight.grad is not None) == trained


def test_the_logits_of_all_supervised_tokens_never_exist_at_once(model, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    vocabulary, hidden_size = model.config.padded_vocab_size, model.config.hidden_size
    rows = set()

    class RecordLogits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shape = result.shape if isinstance(result, torch.Tensor) else ()
            if shape[-1:] == (vocabulary,) and shape != (hidden_size, vocabulary):  # that is the transposed weight
                rows.add(shape[:-1].numel())
            return result

    monkeypatch.setattr("chatglm2.loss.loss_rows", lambda device_type: 4)
    input_ids, labels = batch()
    with RecordLogits():
        model.train()(input_ids, labels=labels).loss.backward()
    model.eval()
    assert max(rows) == 4


@pytest.mark.parametrize("left_padded", [False, True])
def test_the_flash_kernels_form_of_the_mask_changes_no_number(model, monkeypatch, left_padded):
    input_ids, labels = batch()
    inputs = {"input_ids": input_ids, "labels": labels}
    if left_padded:
        inputs = {
            **LEFT_PADDED,
            "labels": LEFT_PADDED["input_ids"].masked_fill(LEFT_PADDED["attention_mask"] == 0, -100),
        }
    loss, gradient = losses_and_gradients(model, **inputs)
    monkeypatch.setattr("chatglm2.attention.flash_attention_runs", lambda device, dtype: True)
    flash_loss, flash_gradient = losses_and_gradients(model, **inputs)
    assert flash_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(flash_gradient, gradient) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_the_norm_the_gate_and_the_rotation_have_the_gradients_of_plain_operations(dtype, bound):
    def plain_gate(x):
        gate, value = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * value

    def plain_rotation(x):
        even, odd = x[..., 0:4:2], x[..., 1:4:2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((turned, x[..., 4:]), dim=-1)

    torch.manual_seed(0)
    cos, sin = rotary_cos_sin(torch.tensor([[0, 1, 5]]), 8, dtype)
    weight = (1 + 0.1 * torch.randn(8)).to(dtype).requires_grad_()
    wide_weight = weight.detach().float().requires_grad_()
    x = torch.randn(2, 2, 3, 8).to(dtype)
    for ours, plain in (
        (
            lambda x: NormProduct.apply(x, weight, 1e-5),
            lambda x: torch.nn.functional.rms_norm(x, (8,), wide_weight, 1e-5),
        ),
        (SwiGLU.apply, plain_gate),
        (lambda x: Rotary.apply(x, cos, sin), plain_rotation),
    ):
        leaf, wide = x.clone().requires_grad_(), x.float().clone().requires_grad_()
        result, expected = ours(leaf), plain(wide)
        weights = torch.randn_like(expected).to(dtype).float()
        (result.float() * weights).sum().backward()
        (expected * weights).sum().backward()
        assert result.dtype == dtype
        assert relative_difference(result.detach(), expected.detach()) < bound
        assert relative_difference(leaf.grad, wide.grad) < bound
    assert relative_difference(weight.grad, wide_weight.grad) < bound


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_graph_reaches_below_the_first_prefix(checkpointing):
    model = synthetic_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    needs_gradient = {}
    layers = model.transformer.encoder.layers
    modules = {
        "embedding": model.transformer.embedding,
        "first norm": layers[0].input_layernorm,
        "first projection": layers[0].self_attention.query_key_value,
        "first output": layers[0].self_attention.dense,
        "second projection": layers[1].self_attention.query_key_value,
    }
    for name, module in modules.items():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: needs_gradient.update({name: output.requires_grad})
        )
    input_ids, labels = batch()
    model(input_ids, labels=labels).loss.backward()
    assert [name for name, needed in needs_gradient.items() if not needed][:3] == list(modules)[:3]
    assert checkpointing or needs_gradient["first output"] and needs_gradient["second projection"]


# ---- every field of the configuration


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
    cos, sin = rotary_cos_sin(torch.tensor([[3]]), 8, torch.float32)
    y = Rotary.apply(x, cos, sin)
    for pair, frequency in enumerate((1.0, 0.01)):  # 10000 ** (-2 * pair / 4)
        turned = complex(*x[0, 0, 0, 2 * pair : 2 * pair + 2]) * numpy.exp(3j * frequency)
        assert y[0, 0, 0, 2 * pair : 2 * pair + 2].tolist() == pytest.approx([turned.real, turned.imag], abs=1e-6)
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize(
    "fields",
    [
        {"original_rope": False},
        {"rope_ratio": 50},
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


# ---- transformers


def test_output_is_transformers_own_class(model):
    output = model(batch()[0])
    assert isinstance(output, CausalLMOutputWithPast)
    assert output.logits.shape == (3, 20, model.config.padded_vocab_size)
    assert model.transformer(batch()[0]).last_hidden_state.shape == (3, 20, model.config.hidden_size)
    assert isinstance(model(batch()[0], return_dict=False), tuple)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_auto_classes_load_a_folder_with_our_code(auto_class, model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ChatGLMConfig)
    loaded = auto_class.from_pretrained(tmp_path)
    assert isinstance(loaded, ChatGLMForConditionalGeneration)
    assert torch.equal(loaded(batch()[0]).logits, model(batch()[0]).logits)


def test_ids_without_a_token_are_listed_for_suppression(model):
    class Tokenizer:
        vocab_size = 300

    assert unknown_token_ids(Tokenizer, model.config) == list(range(300, 320))
    Tokenizer.vocab_size = 320
    assert unknown_token_ids(Tokenizer, model.config) is None
