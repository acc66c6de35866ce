"""The model under torch.func and torch.export, which want operations that torch knows itself."""

import pytest
import torch
from conftest import relative_difference, synthetic_model
from support.small_chatglm1 import CONFIG as SMALL_CHATGLM1
from support.small_chatglm1 import GMASK, SOP
from support.small_model import batch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.executorch import register_dynamic_cache_export_support

from chatglm1 import modeling_chatglm as chatglm1
from chatglm2.quantization import PACKED, quantize_model_, use_backend_


def weights_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def loss_of(model):
    def loss(weights, input_ids, labels):
        return functional_call(model, weights, kwargs={"input_ids": input_ids, "labels": labels}).loss

    return loss


def gradients_of(model, input_ids, labels):
    model.zero_grad()
    model(input_ids, labels=labels).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    assert max(relative_difference(found[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prefix", [{}, {"pre_seq_len": None}], ids=["prefix", "all weights"])
def test_a_gradient_of_torch_func_is_that_of_backward(training, prefix):
    model = synthetic_model(prefix_dropout=0.0, **prefix).train(training).requires_grad_(True)
    assert_close(grad(loss_of(model))(weights_of(model), *batch()), gradients_of(model, *batch()))


@pytest.mark.parametrize("training", [False, True])
def test_each_row_can_have_a_gradient_of_its_own(training):
    model = synthetic_model(prefix_dropout=0.0).train(training)

    def of_row(weights, *row):
        return loss_of(model)(weights, *(x[None] for x in row))

    found = vmap(grad(of_row), in_dims=(None, 0, 0))(weights_of(model), *batch())
    for row in range(len(batch()[0])):
        expected = gradients_of(model, *(x[row : row + 1] for x in batch()))
        assert_close({name: rows[row] for name, rows in found.items()}, expected)


def test_a_tangent_is_the_gradient_along_it():
    model = synthetic_model()
    weights = weights_of(model)
    along = {
        name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) for name, weight in weights.items()
    }
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels of a CPU know no tangents
        _, found = jvp(lambda weights: loss_of(model)(weights, *batch()), (weights,), (along,))
    expected = sum((gradient * along[name]).sum() for name, gradient in gradients_of(model, *batch()).items())
    assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gradient_through_integer_weights_is_that_of_backward(bits):
    model = synthetic_model(prefix_dropout=0.0)
    quantize_model_(model, bits)
    assert_close(grad(loss_of(model))(weights_of(model), *batch()), gradients_of(model, *batch()))


# ---- exported programs


def exported(model, **inputs):
    rows, length = Dim("rows"), Dim("length", max=model.config.seq_length)
    shapes = {name: None if isinstance(value, bool) else {0: rows, 1: length} for name, value in inputs.items()}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()


def integers():
    model = synthetic_model(seq_length=512)
    quantize_model_(model, 4)
    use_backend_(model, PACKED)
    return model


def first_generation():
    torch.manual_seed(0)
    return chatglm1.ChatGLMForConditionalGeneration(chatglm1.ChatGLMConfig(**SMALL_CHATGLM1, pre_seq_len=3))


MODELS = {
    "prefix": lambda: synthetic_model(seq_length=512),
    "no prefix": lambda: synthetic_model(seq_length=512, pre_seq_len=None),
    "int4": integers,
    "ChatGLM-6B": first_generation,
}


def padded_on_the_left(rows, length):
    input_ids = torch.arange(rows * length).view(rows, length) % 90 + 5
    input_ids[:, 4:6] = torch.tensor([GMASK, SOP])  # where the context of a ChatGLM-6B ends
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_program_gives_the_logits_of_other_lengths_and_rows(kind):
    model = MODELS[kind]().eval()
    program = exported(model, **padded_on_the_left(3, 20))
    for rows, length in ((2, 7), (5, 260)):  # the latter is more than QUERY_BLOCK
        inputs = padded_on_the_left(rows, min(length, model.config.seq_length))
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            found, expected = program(**inputs).logits[real], model(**inputs).logits[real]
        assert relative_difference(found, expected) < (0.01 if kind == "int4" else 1e-5)  # a packed product rounds


def test_an_exported_program_gives_the_loss_and_its_gradient():
    model = synthetic_model(prefix_dropout=0.0)
    input_ids, labels = batch()
    program = exported(model, input_ids=input_ids, labels=labels, use_cache=False)
    program(input_ids=input_ids[:, :-2], labels=labels[:, :-2], use_cache=False).loss.backward()
    (found,) = (weight.grad for weight in program.parameters() if weight.grad is not None)
    (expected,) = gradients_of(model, input_ids[:, :-2], labels[:, :-2]).values()
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("prefix", [{}, {"pre_seq_len": None}], ids=["prefix", "no prefix"])
@torch.no_grad()
def test_an_exported_step_continues_caches_of_other_lengths_and_rows(prefix):
    register_dynamic_cache_export_support()
    model = synthetic_model(**prefix)

    def step(rows, cached, fed):
        token_ids = torch.arange(rows * (cached + fed)).view(rows, -1) % 90 + 5
        cache = model(token_ids[:, :cached], use_cache=True).past_key_values
        return {"input_ids": token_ids[:, cached:], "past_key_values": cache, "use_cache": True}, token_ids

    inputs, _ = step(3, 12, 2)
    layers = [{0: Dim.AUTO, 2: Dim.AUTO}] * model.config.num_layers
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "past_key_values": [layers, layers], "use_cache": None}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    inputs, token_ids = step(2, 8, 3)
    assert relative_difference(program(**inputs).logits, model(token_ids).logits[:, -3:]) < 1e-5


@torch.no_grad()
def test_a_model_that_is_compiled_for_any_length_is_compiled_once():
    model, compilations = synthetic_model(), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, backend=compilations)
    for length in (9, 15, 7):
        input_ids = batch()[0][:, :length]
        expected = model(input_ids).logits
        assert relative_difference(compiled(input_ids, use_cache=False).logits, expected) < 1e-5
    assert compilations.frame_count == 1
