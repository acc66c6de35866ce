"""The transformer, its loss, and generate(): equal to the official code's figures, and to itself."""

import json

import numpy
import pytest
import torch
from conftest import SYNTHETIC, formula_model, relative_difference, synthetic_model
from support.small_model import ENDLESS, LEFT_PADDED, batch, generate, model  # noqa: F401, fixtures
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm2.chat import unknown_token_ids
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from pretrained import register_auto_classes

register_auto_classes()


@pytest.fixture(scope="module")
def base():
    return synthetic_model(pre_seq_len=None)


# ---- equal to the official code, wherever the tests run


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
    assert unknown_token_ids(range(300), model.config) == list(range(300, 320))  # a tokenizer has a length, too
    assert unknown_token_ids(range(320), model.config) is None
