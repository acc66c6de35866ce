"""chat and stream_chat: official signatures, growing text, whole characters, one cache for a conversation."""

import inspect

import pytest
import torch
from conftest import TINY
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor

from chatglm2.chat import unknown_token_ids
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from checkpoint import load_model, load_tokenizer, read_config
from pretrained import register_auto_classes

register_auto_classes()

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
    kept = [token_id for token_id in answer if token_id != tokenizer.eos_token_id]
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


# ---- generate()'s arguments, and the official methods beside chat

STRONG = {"repetition_penalty": 1e6}  # no token comes twice, nor one of the prompt


def streamed(model, tokenizer, **arguments):
    *_, (response, _) = model.stream_chat(tokenizer, QUERY, **{**GREEDY, **arguments})
    return response


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 24},
        {"num_beams": 1},
        {"suppress_tokens": [300, 301]},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_k": 5, "temperature": 1.5, "typical_p": 0.9},
    ],
    ids=str,
)
def test_a_stream_honours_an_argument_of_generate_as_chat_does(arguments, model, tokenizer):
    torch.manual_seed(3)
    expected = model.chat(tokenizer, QUERY, **{**GREEDY, **arguments})[0]
    torch.manual_seed(3)
    assert streamed(model, tokenizer, **arguments) == expected


def test_an_argument_of_generate_changes_the_stream(model, tokenizer):
    assert streamed(model, tokenizer, **STRONG) != streamed(model, tokenizer)


def test_top_k_1_is_the_likeliest_token_whatever_is_drawn(model, tokenizer):
    greedy = streamed(model, tokenizer)
    assert model.chat(tokenizer, QUERY, top_k=1, max_new_tokens=24)[0] == greedy
    assert streamed(model, tokenizer, do_sample=True, top_k=1) == greedy


def test_stopping_criteria_end_a_stream(model, tokenizer):
    texts = list(model.stream_chat(tokenizer, QUERY, stopping_criteria=[lambda ids, scores, **_: True], **GREEDY))
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("method", "argument", "replacement"),
    [
        ("stream_chat", {"num_beams": 2}, r"model\.chat\(…, num_beams=…\)"),
        ("stream_chat", {"num_return_sequences": 2}, r"model\.generate"),
        ("stream_chat", {"streamer": "a streamer"}, "the texts that stream_chat yields"),
        ("stream_chat", {"return_dict_in_generate": True}, r"model\.generate"),
        ("chat", {"num_return_sequences": 2}, r"model\.generate"),
        ("chat", {"return_dict_in_generate": True}, r"model\.generate"),
    ],
    ids=str,
)
def test_an_argument_that_one_text_cannot_honour_names_the_replacement(method, argument, replacement, model, tokenizer):
    with pytest.raises(ValueError, match=f"{method}: {next(iter(argument))}=.*{replacement}"):
        list(getattr(model, method)(tokenizer, QUERY, **argument))


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
def test_a_mistyped_argument_is_an_error_that_names_it(method, model, tokenizer):
    with pytest.raises(ValueError, match="repetition_penality"):
        list(getattr(model, method)(tokenizer, QUERY, repetition_penality=2))


def test_the_official_methods_have_their_signatures():
    assert parameters(ChatGLMForConditionalGeneration.stream_generate) == [
        ("input_ids", None),
        ("generation_config", None),
        ("logits_processor", None),
        ("stopping_criteria", None),
        ("prefix_allowed_tokens_fn", None),
        ("return_past_key_values", False),
    ]
    for name in ("build_inputs", "build_stream_inputs"):
        official = [("tokenizer", None), ("query", None), ("history", None)]
        assert parameters(getattr(ChatGLMForConditionalGeneration, name)) == official
    assert parameters(ChatGLMForConditionalGeneration.quantize) == [
        ("bits", None),
        ("empty_init", False),
        ("device", None),
    ]
    assert parameters(ChatGLMForConditionalGeneration.__init__) == [
        ("config", None),
        ("empty_init", True),
        ("device", None),
    ]


def test_build_inputs_gives_the_prompt_of_the_conversation(model, tokenizer):
    inputs = model.build_inputs(tokenizer, "天气", history=[("你好", "你好！")])
    expected = tokenizer.encode(tokenizer.build_prompt("天气", [("你好", "你好！")]))
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]
    assert inputs["position_ids"].tolist() == [list(range(len(expected)))]


def test_build_stream_inputs_gives_the_new_turn_alone(model, tokenizer):
    inputs = model.build_stream_inputs(tokenizer, "天气", history=[("你好", "你好！")])
    assert tokenizer.decode(inputs["input_ids"][0].tolist()) == "\n\n[Round 2]\n\n问：天气\n\n答："
    first = model.build_stream_inputs(tokenizer, "天气")
    assert first["input_ids"].tolist() == model.build_inputs(tokenizer, "天气")["input_ids"].tolist()


def test_stream_generate_yields_what_generate_returns_token_by_token(model, tokenizer):
    inputs = model.build_inputs(tokenizer, QUERY)
    expected = model.generate(**inputs, **GREEDY)[0].tolist()
    outputs = [output[0].tolist() for output in model.stream_generate(**inputs, **GREEDY)]
    length = inputs["input_ids"].shape[1]
    assert outputs == [expected[: length + count] for count in range(1, len(expected) - length + 1)]


def test_stream_generate_ends_with_the_end_token(model, tokenizer):
    inputs = model.build_inputs(tokenizer, QUERY)
    processor = [Say(tokenizer.encode("好", add_special_tokens=False), tokenizer.eos_token_id)]
    *_, output = model.stream_generate(**inputs, logits_processor=processor)
    assert output[0, -1] == tokenizer.eos_token_id


def test_stream_generate_takes_a_generation_config(model, tokenizer):
    inputs = model.build_inputs(tokenizer, QUERY)
    settings = GenerationConfig(do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=2)
    assert len(list(model.stream_generate(inputs["input_ids"], generation_config=settings))) == 5


def test_stream_generate_answers_padded_rows_as_alone(model, tokenizer):
    prompts = [tokenizer.build_prompt(query) for query in (QUERY, "你好")]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    *_, together = model.stream_generate(**batch, **GREEDY)
    for row, prompt in enumerate(prompts):
        inputs = tokenizer([prompt], return_tensors="pt")
        *_, alone = model.stream_generate(**inputs, **GREEDY)
        answer = alone[0, inputs["input_ids"].shape[1] :].tolist()
        assert together[row, batch["input_ids"].shape[1] :].tolist()[: len(answer)] == answer


@pytest.mark.parametrize("turn", [1, 2])
def test_a_returned_cache_holds_every_token_that_was_shown(turn, model, tokenizer):
    history, cache = [], None
    if turn == 2:
        *_, (_, history, cache) = model.stream_chat(tokenizer, QUERY, return_past_key_values=True, **GREEDY)
    before = 0 if cache is None else int(cache.get_seq_length()) - model.prefix_length
    before += model.build_stream_inputs(tokenizer, "天气", history)["input_ids"].shape[1]
    token_id = tokenizer.encode("好看")[-1]
    settings = {"logits_processor": [Say([token_id] * 5, tokenizer.eos_token_id)], "max_new_tokens": 5}
    lengths = [
        int(grown.get_seq_length()) - model.prefix_length
        for _, _, grown in model.stream_chat(
            tokenizer, "天气", history, past_key_values=cache, return_past_key_values=True, **settings
        )
    ]
    assert lengths == [before + count for count in range(1, 6)]


def test_a_conversation_continued_with_the_cache_equals_the_one_without_after_a_limit(model, tokenizer):
    limited = {"do_sample": False, "max_new_tokens": 7}
    *_, (response, history, cache) = model.stream_chat(tokenizer, QUERY, return_past_key_values=True, **limited)
    prompt = model.build_inputs(tokenizer, QUERY)["input_ids"]
    answer = model.generate(prompt, suppress_tokens=unknown_token_ids(tokenizer, model.config), **limited)
    assert int(cache.get_seq_length()) - model.prefix_length == answer.shape[1]
    turn = model.build_stream_inputs(tokenizer, "再写一句", history)["input_ids"]
    with torch.inference_mode():
        continued = model(turn, past_key_values=cache).logits[0, -1]
        whole = model(torch.cat((answer, turn), dim=1)).logits[0, -1]
    assert torch.allclose(continued, whole, atol=1e-4)


def test_a_stream_that_is_left_early_leaves_a_cache_with_what_was_shown(model, tokenizer):
    stream = model.stream_chat(tokenizer, QUERY, return_past_key_values=True, **GREEDY)
    for _ in range(3):
        _, _, cache = next(stream)
    stream.close()
    prompt = model.build_inputs(tokenizer, QUERY)["input_ids"].shape[1]
    assert int(cache.get_seq_length()) == model.prefix_length + prompt + 3


def test_a_cache_in_the_layout_of_2023_is_an_error_that_says_what_to_give(model, tokenizer):
    with pytest.raises(ValueError, match=r"past_key_values is a tuple, expected the cache that stream_chat"):
        list(model.stream_chat(tokenizer, QUERY, [("你好", "你好！")], past_key_values=((1, 2),)))


def test_a_stream_computes_each_token_once(model, tokenizer):
    fed = []
    handle = model.transformer.embedding.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0]))
    try:
        *_, (_, history) = model.stream_chat(tokenizer, QUERY, do_sample=False, max_new_tokens=5)
    finally:
        handle.remove()
    assert [ids.shape[1] for ids in fed[1:]] == [1] * 4
