"""What training computes differently is equal to the plain operations."""

import pytest
import torch
from conftest import relative_difference, synthetic_model
from support.small_model import LEFT_PADDED, batch, generate, model  # noqa: F401, fixtures
from torch.utils._python_dispatch import TorchDispatchMode

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.loss import OutputLayer, SupervisedLoss, next_tokens, supervised_loss
from chatglm2.matmul import ONEDNN, round_rows
from chatglm2.modeling_chatglm import Rotary, SwiGLU, rotary_cos_sin
from chatglm2.norms import NormProduct
from tuning.methods import prepare_model


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
        supervised_loss(hidden_states, next_tokens(labels), layer).backward()
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
    cos, sin = rotary_cos_sin(torch.tensor([[0, 1, 5]]), ChatGLMConfig(kv_channels=8), dtype)
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


class Products(TorchDispatchMode):
    """Notes the dtypes of all products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("finetuning_type", ["full", "freeze"])
def test_under_autocast_every_product_is_in_its_dtype(finetuning_type):
    model = synthetic_model(pre_seq_len=None)
    prepare_model(model, finetuning_type, do_train=True)
    input_ids, labels = batch()
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(input_ids=input_ids, labels=labels).loss
        loss.backward()
    assert products.dtypes == {torch.bfloat16}
