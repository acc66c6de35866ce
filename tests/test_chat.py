"""chat and stream_chat: official signatures, growing text, whole characters, one cache for a conversation."""

import inspect

import pytest
import torch
from conftest import TINY
from transformers import AutoTokenizer, LogitsProcessor

from checkpoint import load_model, load_tokenizer, read_config
from modeling_chatglm import ChatGLMForConditionalGeneration, unknown_token_ids
from tokenization_chatglm import ChatGLMTokenizer

QUERY = "类型#裙*颜色#白色"
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, read_config(TINY))


@pytest.fixture(scope="module", params=[None, 4], ids=["base", "prefix"])
def model(request):
    torch.manual_seed(0)
    return load_model(TINY, config=read_config(TINY, pre_seq_len=request.param))


class Say(LogitsProcessor):
    """Makes the model say given ids, one after another, and then end."""

    def __init__(self, token_ids, eos_token_id):
        self.token_ids = [*token_ids, eos_token_id]

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token_ids.pop(0)] = 0
        return forced


def parameters(function):
    skipped = ("self", "kwargs")
    signature = inspect.signature(function).parameters.values()
    return [(p.name, None if p.default is p.empty else p.default) for p in signature if p.name not in skipped]


def test_chat_has_the_official_signature_and_defaults():
    assert parameters(ChatGLMForConditionalGeneration.chat) == [
        ("tokenizer", None),
        ("query", None),
        ("history", None),
        ("max_length", 8192),
        ("num_beams", 1),
        ("do_sample", True),
        ("top_p", 0.8),
        ("temperature", 0.8),
        ("logits_processor", None),
    ]


def test_stream_chat_has_the_official_signature_and_defaults():
    assert parameters(ChatGLMForConditionalGeneration.stream_chat) == [
        ("tokenizer", None),
        ("query", None),
        ("history", None),
        ("past_key_values", None),
        ("max_length", 8192),
        ("do_sample", True),
        ("top_p", 0.8),
        ("temperature", 0.8),
        ("logits_processor", None),
        ("return_past_key_values", False),
    ]


def test_chat_returns_the_response_and_the_history_with_the_new_turn(model, tokenizer):
    response, history = model.chat(tokenizer, QUERY, [("你好", "你好！")], **GREEDY)
    assert history == [("你好", "你好！"), (QUERY, response)]
    assert response and response == response.strip()


def test_chat_does_not_change_the_history_it_is_given(model, tokenizer):
    history = []
    model.chat(tokenizer, QUERY, history, **GREEDY)
    assert history == []


def test_the_stream_grows_and_ends_with_what_chat_answers(model, tokenizer):
    texts = [response for response, _ in model.stream_chat(tokenizer, QUERY, **GREEDY)]
    assert len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert texts[-1] == model.chat(tokenizer, QUERY, **GREEDY)[0]


def test_sampling_with_a_seed_gives_the_same_stream_and_chat(model, tokenizer):
    torch.manual_seed(5)
    streamed = [response for response, _ in model.stream_chat(tokenizer, QUERY, max_new_tokens=16)][-1]
    torch.manual_seed(5)
    assert streamed == model.chat(tokenizer, QUERY, max_new_tokens=16)[0]


def test_the_stream_never_shows_half_a_character(model, tokenizer):
    text = "好😀，龘"
    spoken = tokenizer.encode(text, add_special_tokens=False)
    assert len(spoken) > len(text)  # some characters take several tokens here
    processor = [Say(spoken, tokenizer.eos_token_id)]
    texts = [response for response, _ in model.stream_chat(tokenizer, QUERY, logits_processor=processor)]
    assert texts[-1] == text
    assert not any("\ufffd" in shown for shown in texts)


def test_the_training_date_is_filled_in_as_official(model, tokenizer):
    processor = [Say(tokenizer.encode("训练于[[训练时间]]", add_special_tokens=False), tokenizer.eos_token_id)]
    assert model.chat(tokenizer, "你好", logits_processor=processor)[0] == "训练于2023年"


def test_a_second_turn_with_the_cache_feeds_only_the_question(model, tokenizer):
    first = list(model.stream_chat(tokenizer, QUERY, return_past_key_values=True, **GREEDY))
    response, history, cache = first[-1]
    length_before = int(cache.get_seq_length())
    fed = []
    handle = model.transformer.embedding.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0]))
    *_, (answer, history, cache) = model.stream_chat(
        tokenizer, "再写一句", history, past_key_values=cache, return_past_key_values=True, **GREEDY
    )
    handle.remove()
    turn = "\n\n" + tokenizer.build_turn("再写一句", 2)
    assert tokenizer.decode(fed[0][0].tolist()) == turn
    assert [turn_history[0] for turn_history in history] == [QUERY, "再写一句"]
    assert int(cache.get_seq_length()) > length_before + fed[0].shape[1]


def test_answers_with_a_kept_cache_equal_answers_on_the_whole_conversation(model, tokenizer):
    *_, (_, history, cache) = model.stream_chat(tokenizer, QUERY, return_past_key_values=True, **GREEDY)
    prompt = tokenizer.encode(tokenizer.build_prompt(QUERY))
    answer = model.generate(
        torch.tensor([prompt]), suppress_tokens=unknown_token_ids(tokenizer, model.config), **GREEDY
    )[0, len(prompt) :].tolist()
    turn = tokenizer.encode("\n\n" + tokenizer.build_turn("再写一句", 2), add_special_tokens=False)[1:]
    kept = answer[:-1]  # the last token, an end or one over the limit, was never fed
    whole = torch.tensor([prompt + kept + turn])
    expected = model.generate(whole, suppress_tokens=unknown_token_ids(tokenizer, model.config), **GREEDY)
    *_, (second, _, _) = model.stream_chat(
        tokenizer, "再写一句", history, past_key_values=cache, return_past_key_values=True, **GREEDY
    )
    assert second == model.process_response(tokenizer.decode(expected[0, whole.shape[1] :].tolist()))


def test_ids_without_a_token_are_never_sampled_by_chat(model, tokenizer):
    unknown = unknown_token_ids(tokenizer, model.config)
    assert unknown

    def prefer_unknown(module, inputs, output):
        output[..., unknown] += 1e4
        return output

    handle = model.transformer.output_layer.register_forward_hook(prefer_unknown)
    try:
        assert model.chat(tokenizer, QUERY, **GREEDY)[0]
        assert list(model.stream_chat(tokenizer, QUERY, **GREEDY))
    finally:
        handle.remove()


def test_beam_search_chat_answers(model, tokenizer):
    assert model.chat(tokenizer, QUERY, num_beams=2, **GREEDY)[0]


def test_a_conversation_without_room_for_an_answer_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="no room for an answer"):
        list(model.stream_chat(tokenizer, QUERY, max_length=5))


def test_autotokenizer_gives_our_tokenizer():
    assert isinstance(AutoTokenizer.from_pretrained(TINY), ChatGLMTokenizer)
