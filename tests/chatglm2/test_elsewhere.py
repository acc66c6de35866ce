"""The classes in other people's hands: what transformers, accelerate, torch.compile and PEFT ask of a model."""

import pytest
import torch
from accelerate import disk_offload, dispatch_model
from conftest import relative_difference, synthetic_model
from peft import AdaLoraConfig, get_peft_model
from support.small_model import ENDLESS, LEFT_PADDED, batch, model  # noqa: F401, fixtures
from torch import nn

from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.loss import OutputLayer


def gradient_of(model):
    input_ids, labels = batch()
    model.zero_grad()
    model.train()(input_ids, labels=labels).loss.backward()
    return model.transformer.prefix_encoder.embedding.weight.grad.clone()


@pytest.mark.parametrize("training", [False, True])
def test_hidden_states_and_attentions_are_given_and_change_no_number(model, training):
    input_ids, labels = batch()
    labels[:, -3:] = -100
    plain = model.train(training)(input_ids, labels=labels)
    shown = model(input_ids, labels=labels, output_hidden_states=True, output_attentions=True)
    model.eval()
    assert shown.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    layers, keys = model.config.num_layers, model.prefix_length + input_ids.shape[1]
    assert [states.shape[:2] for states in shown.hidden_states] == [input_ids.shape] * (layers + 1)
    heads = model.config.num_attention_heads
    assert [x.shape[1:] for x in shown.attentions] == [(heads, input_ids.shape[1], keys)] * layers
    sums = shown.attentions[0].sum(-1).detach()
    assert relative_difference(sums, torch.ones_like(sums)) < 1e-6


def test_attentions_of_left_padded_rows_are_the_ones_that_are_computed_with(model):
    real = LEFT_PADDED["attention_mask"].bool()
    shown = model(**LEFT_PADDED, output_attentions=True)
    assert relative_difference(shown.logits[real], model(**LEFT_PADDED).logits[real]) < 1e-5
    padding = shown.attentions[0][..., model.prefix_length :][:, :, -1][~real[:, None].expand(-1, 4, -1)]
    assert padding.abs().max() == 0 and shown.logits.isfinite().all()


def test_the_configuration_can_ask_for_tuples():
    model = synthetic_model(return_dict=False)
    assert isinstance(model(torch.arange(4)[None]), tuple)
    assert isinstance(model.transformer(torch.arange(4)[None]), tuple)


def test_logits_of_chosen_places(model):
    input_ids, _ = batch()
    places = torch.tensor([1, 3])
    assert torch.equal(model(input_ids, logits_to_keep=places).logits, model(input_ids).logits[:, places])


def test_a_mask_of_four_dimensions_is_refused_with_the_shape_that_is_expected(model):
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions, expected the two"):
        model(torch.arange(4)[None], attention_mask=torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("columns", [3, 9])
def test_a_mask_of_other_tokens_than_those_that_are_fed_is_refused(columns, model):
    with pytest.raises(ValueError, match=f"attention_mask has {columns} columns, expected 6"):
        model(torch.ones(2, 6, dtype=torch.long), attention_mask=torch.ones(2, columns))
    cache = model(torch.ones(2, 6, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"attention_mask has {columns} columns, expected 7"):
        model(torch.ones(2, 1, dtype=torch.long), attention_mask=torch.ones(2, columns), past_key_values=cache)


@pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 64)}])
def test_ids_or_embeddings_are_fed_and_not_both(inputs, model):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(**inputs)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_without_rows_or_tokens_is_refused(shape, training):
    empty = torch.zeros(shape, dtype=torch.long)
    model = synthetic_model().train(training)
    with pytest.raises(ValueError, match=r"have the shape \(\d, \d\), expected a row and a token at least"):
        model(empty, labels=empty)


def test_a_cache_of_the_official_form_is_refused(model):
    layers = [(layer.keys, layer.values) for layer in model(torch.ones(1, 2).long()).past_key_values.layers]
    with pytest.raises(ValueError, match="past_key_values is a tuple, expected a Cache"):
        model(torch.ones(1, 1).long(), past_key_values=tuple(layers))


def test_a_model_can_be_its_own_assistant_with_fewer_layers(model):
    input_ids = torch.arange(5, 12)[None]
    alone = model.generate(input_ids, **ENDLESS)
    assert torch.equal(model.generate(input_ids, assistant_early_exit=1, **ENDLESS), alone)


def test_generate_begins_with_embeddings_as_with_their_ids(model):
    input_ids = batch()[0][:1]
    embeddings = model.get_input_embeddings()(input_ids)
    expected = model.generate(input_ids, **ENDLESS)[:, input_ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **ENDLESS), expected)


def test_a_vocabulary_that_grew_trains_and_predicts():
    model = synthetic_model()
    size = model.config.padded_vocab_size
    expected = model(*batch()[:1]).logits
    model.resize_token_embeddings(size + 8)
    assert isinstance(model.get_output_embeddings(), OutputLayer)
    assert model.config.vocab_size == size + 8
    assert torch.equal(model(*batch()[:1]).logits[..., :size], expected)
    assert gradient_of(model).abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_either_kind_gives_the_gradient_of_the_prefix(reentrant):
    model = synthetic_model(prefix_projection=False)
    expected = gradient_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert relative_difference(gradient_of(model), expected) < 1e-6


def test_an_answer_between_steps_with_gradient_checkpointing_is_right_or_refused():
    model, input_ids = synthetic_model(prefix_dropout=0.0), torch.arange(5, 12)[None]
    expected = model.generate(input_ids, **ENDLESS)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing.*model.eval"):
        model.generate(input_ids, **ENDLESS)
    assert torch.equal(model.generate(input_ids, use_cache=False, **ENDLESS), expected)
    assert torch.equal(model.eval().generate(input_ids, **ENDLESS), expected)


@pytest.mark.parametrize("prefix", [False, True])
def test_adapters_train_over_a_frozen_model_whose_blocks_are_computed_again(prefix):
    model = synthetic_model(**({} if prefix else {"pre_seq_len": None}))
    adapted = get_peft_model(model, AdaLoraConfig(total_step=1, target_modules=["query_key_value"])).train()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    input_ids, labels = batch()
    adapted(input_ids=input_ids, labels=labels).loss.backward()  # AdaLoRA adds to a product in place
    assert any(weight.grad is not None for name, weight in adapted.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_gives_the_same_numbers(training):
    model = synthetic_model().train(training)
    input_ids, labels = batch()
    expected = model(input_ids, labels=labels)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")(input_ids, labels=labels)
    assert compiled.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    if training:
        compiled.loss.backward()
        assert relative_difference(model.transformer.prefix_encoder.embedding.weight.grad, gradient_of(model)) < 1e-4


def test_weights_on_a_disk_give_the_same_numbers(tmp_path):
    model, input_ids = synthetic_model(), batch()[0]
    expected = model(input_ids).logits
    disk_offload(model, tmp_path)
    assert torch.equal(model(input_ids).logits, expected)


def test_a_dispatched_model_gives_the_same_numbers(tmp_path):
    model, input_ids = synthetic_model(), batch()[0]
    expected = model(input_ids).logits
    places = {"transformer.embedding": "cpu", "transformer.prefix_encoder": "cpu", "transformer.output_layer": "cpu"}
    model = dispatch_model(
        model, {**places, "transformer.encoder": "disk"}, main_device="cpu", offload_dir=str(tmp_path)
    )
    assert torch.equal(model(input_ids).logits, expected)


def test_generate_finds_no_encoder(model):
    assert model.get_encoder() is model


def test_the_configuration_has_the_names_that_others_look_for():
    config = ChatGLMConfig(vocab_size=77, num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2)
    assert config.vocab_size == config.padded_vocab_size == 77
    assert config.bos_token_id is None
    assert ChatGLMConfig(bos_token_id=1).bos_token_id == 1
    assert config.to_dict()["num_key_value_heads"] == 2
    assert "num_key_value_heads" not in config.to_json_string()
    assert ChatGLMConfig(**config.to_dict()).num_key_value_heads == 2


def test_configurations_that_differ_are_not_equal():
    assert ChatGLMConfig() == ChatGLMConfig() != ChatGLMConfig(num_layers=1)
    assert ChatGLMConfig() != ChatGLMConfig(pre_seq_len=4)


def test_labels_and_what_is_shown_can_be_asked_for():
    config = ChatGLMConfig(num_labels=3, problem_type="regression", output_attentions=True)
    assert (config.num_labels, len(config.id2label), config.problem_type) == (3, 3, "regression")
    assert config.output_attentions and synthetic_model(output_attentions=True)(torch.ones(1, 2).long()).attentions
    for number in (0, 2**40, "3"):
        with pytest.raises(ValueError, match=f"num_labels is {number!r}"):
            ChatGLMConfig(num_labels=number)


def test_groups_of_keys_can_have_the_librarys_name():
    config = ChatGLMConfig(multi_query_attention=True, num_key_value_heads=4)
    assert config.num_key_value_heads == config.multi_query_group_num == 4
    assert ChatGLMConfig(num_key_value_heads=32).num_key_value_heads == 32
    assert ChatGLMConfig.from_dict(config.to_dict()).num_key_value_heads == 4
    with pytest.raises(ValueError, match="num_key_value_heads is 4, .* 32"):
        ChatGLMConfig(num_key_value_heads=4)


def test_no_code_is_looked_for_in_the_configuration():
    assert ChatGLMConfig(auto_map={"AutoModel": "a.B"}).auto_map == {}


@pytest.mark.parametrize("method", ["IA3Config", "AdaLoraConfig", "VBLoRAConfig", "LNTuningConfig"])
def test_methods_of_peft_know_what_to_adapt(method):
    import peft

    from pretrained import register_auto_classes

    register_auto_classes()
    settings = {"AdaLoraConfig": {"total_step": 1}, "VBLoRAConfig": {"vector_length": 1, "num_vectors": 2}}
    adapted = get_peft_model(synthetic_model(), getattr(peft, method)(**settings.get(method, {})))
    assert 0 < sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert isinstance(adapted, nn.Module)
