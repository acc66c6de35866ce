"""The batch that answers prompts: equal to generate(), whatever is beside a row; sampling; its cache."""

import contextlib
import itertools
import json
import random

import pytest
import torch
from conftest import SYNTHETIC, synthetic_model
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from chatglm2.chat import TOP_K
from chatglm2.generation import CAPTURE_FAILURES, Batch, answer_prompts, choose, draw, graph_slots
from checkpoint import load_model, load_prefix, load_tokenizer, read_config, read_prefix_settings

NUM_KNOWN = 315  # of the 320 ids; the others are never chosen
MAX_LENGTH = 40
SAMPLED = {"temperature": 0.95, "top_p": 0.7}


@pytest.fixture(scope="module", params=[{}, {"pre_seq_len": None}], ids=["prefix", "base"])
def model(request):
    return synthetic_model(**request.param)


@pytest.fixture(scope="module")
def prompts(model):
    numbers = random.Random(0)
    return [[numbers.randrange(3, 320) for _ in range(numbers.randrange(1, 30))] for _ in range(13)]


@pytest.fixture(scope="module")
def expected(model, prompts):
    """What generate() answers to each prompt alone."""
    settings = GenerationConfig(
        max_length=MAX_LENGTH,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=0,
        suppress_tokens=list(range(NUM_KNOWN, 320)),
    )
    outputs = [model.generate(torch.tensor([prompt]), generation_config=settings) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, prompts, strict=True)]


def answer(model, prompts, batch_size, rows=None, **settings):
    rows = range(len(prompts)) if rows is None else rows
    return answer_prompts(model, prompts, MAX_LENGTH, num_known=NUM_KNOWN, batch_size=batch_size, rows=rows, **settings)


# ---- greedy


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_greedy_answers_are_those_of_generate_in_the_order_of_the_prompts(batch_size, model, prompts, expected):
    lengths = [len(tokens) for tokens in expected]
    assert len(set(lengths)) > 5  # so that rows leave at different times
    assert answer(model, prompts, batch_size) == expected


@pytest.mark.parametrize("query_block", [256, 4])  # 4: pieces of 7 go through LongAttention
def test_prompts_fed_in_pieces_have_the_same_answers(model, prompts, expected, query_block, monkeypatch):
    monkeypatch.setattr("chatglm2.generation.PREFILL_TOKENS", 7)
    monkeypatch.setattr("chatglm2.attention.QUERY_BLOCK", query_block)
    assert answer(model, prompts, 5) == expected


def test_a_finished_row_is_not_computed_any_further(model, prompts, expected, monkeypatch):
    fed = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch, tokens: fed.append(len(tokens)) or step(batch, tokens))
    answer(model, prompts, 4)
    assert sum(fed) == sum(len(tokens) - 1 for tokens in expected)  # the last token of an answer is never fed
    assert max(fed) == 4


def test_the_prefix_is_computed_once(monkeypatch):
    model = synthetic_model()
    calls = []
    model.transformer.prefix_encoder.register_forward_hook(lambda *_: calls.append(1))
    answer(model, [[5, 6], [7], [8, 9, 10]], 1)
    assert len(calls) == 1


def test_progress_is_told_of_every_row(model, prompts):
    told = []
    answer(model, prompts, 4, progress=lambda: told.append(1))
    assert len(told) == len(prompts)


def test_no_prompts_have_no_answers(model):
    assert answer(model, [], 4) == []


def test_the_greedy_tokens_are_those_of_the_official_code():
    model = synthetic_model()
    model.config.eos_token_id = None
    padded = SYNTHETIC["left_padded"]
    for tokens, mask, wanted in zip(
        padded["input_ids"], padded["attention_mask"], padded["greedy_10"]["prefix"], strict=True
    ):
        prompt = [token for token, real in zip(tokens, mask, strict=True) if real]
        settings = {"num_known": 320, "batch_size": 2, "rows": [1]}
        assert answer_prompts(model, [prompt], len(prompt) + 10, **settings) == [wanted]


def test_the_official_checkpoint_predicts_all_32_official_answers(shared):
    reference = json.loads((shared / "golden" / "mini-run.json").read_text())
    checkpoint = shared / "golden" / "official-checkpoint"
    config = read_config(
        shared / "chatglm2-mini", pre_seq_len=read_prefix_settings(checkpoint)["pre_seq_len"], prefix_projection=False
    )
    model = load_model(shared / "chatglm2-mini", config=config)
    load_prefix(model, checkpoint)
    tokenizer = load_tokenizer(checkpoint, config)
    lines = (shared / "AdvertiseGen" / "dev.json").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.build_prompt(json.loads(lines[row])["content"]) for row in reference["rows"]]
    prompts = [tokenizer.encode(text)[:64] for text in texts]
    answers = answer_prompts(model, prompts, 129, num_known=64789, batch_size=9, rows=reference["rows"])
    for tokens, wanted in zip(answers, reference["token_ids"], strict=True):
        assert tokens == wanted[: len(tokens)]
        assert set(wanted[len(tokens) :]) <= {0}  # padding


# ---- sampling


def test_a_sampled_answer_depends_on_its_row_and_the_seed_only(model, prompts):
    sampled = answer(model, prompts, 13, seed=1, **SAMPLED)
    assert answer(model, prompts, 1, seed=1, **SAMPLED) == sampled
    assert answer(model, prompts, 4, seed=1, **SAMPLED) == sampled
    assert answer(model, prompts[::3], 4, rows=range(0, 13, 3), seed=1, **SAMPLED) == sampled[::3]
    assert answer(model, prompts, 13, seed=2, **SAMPLED) != sampled
    assert len({tuple(tokens) for tokens in answer(model, [prompts[0]] * 8, 8, seed=1, **SAMPLED)}) > 1


def test_tokens_are_drawn_with_the_probabilities_of_the_librarys_warpers():
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 200)
    warped = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(TOP_K)(None, TemperatureLogitsWarper(0.95)(None, logits)))
    draws = [(number + 0.5) / 2000 for number in range(2000)]
    drawn = choose(logits.expand(2000, -1), [0.95] * 2000, [0.7] * 2000, draws)
    shares = torch.bincount(torch.tensor(drawn), minlength=200) / 2000
    torch.testing.assert_close(shares, warped.softmax(-1)[0], rtol=0, atol=1e-3)
    assert choose(logits, [0.95], [0.7], [1 - 2**-53])[0] in set(drawn)  # the largest number there is


def test_only_the_50_likeliest_are_drawn():
    drawn = choose(torch.linspace(0, 0.1, 200).expand(500, -1), [1.0] * 500, [1.0] * 500, [n / 500 for n in range(500)])
    assert set(drawn) == set(range(150, 200))


def test_at_temperature_0_or_top_p_0_the_likeliest_is_chosen_beside_rows_that_are_drawn():
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]] * 4)
    assert choose(logits, [0, 1, 1, 1], [1, 0, 0.6, 0.6], [0.99, 0.99, 0.0, 0.99]) == [1, 1, 1, 2]
    assert choose(logits, [0] * 4, [1] * 4, [0.5] * 4) == [1] * 4


def test_without_a_top_p_any_token_is_drawn_as_likely_as_the_model_says():
    logits = torch.linspace(-3, 3, 200, dtype=torch.float64).log_softmax(-1)[None].float()
    logits[0, 7] = -torch.inf
    drawn = draw(logits.expand(20000, -1), [(number + 0.5) / 20000 for number in range(20000)])
    shares = torch.bincount(torch.tensor(drawn), minlength=200) / 20000
    torch.testing.assert_close(shares, logits.softmax(-1)[0], rtol=0, atol=1e-4)
    assert draw(logits.expand(2, -1), [0.0, 1 - 2**-53]) == [0, 199]


def test_an_answer_drawn_from_all_tokens_depends_on_its_row_and_the_seed_only(model, prompts):
    drawn = answer(model, prompts, 13, seed=1, top_p=None)
    assert answer(model, prompts, 4, seed=1, top_p=None) == drawn
    assert answer(model, prompts, 13, seed=2, top_p=None) != drawn


# ---- the cache


def feed(batch, tokens):
    """Greedy answers of 10 tokens to what is in the batch, whose rows have chosen `tokens`."""
    texts = [[token] for token in tokens]
    for _ in range(9):
        tokens = batch.step(tokens).argmax(-1).tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
    return texts


def test_the_cache_grows_while_rows_are_in_it(model, prompts, monkeypatch):
    prefix = prefix_of(model)
    wide, narrow = Batch(model, 3, 100), Batch(model, 3)
    monkeypatch.setattr("chatglm2.generation.WIDTH_STEP", 4)
    texts = [feed(batch, batch.admit(prompts[:3], prefix).argmax(-1).tolist()) for batch in (wide, narrow)]
    assert texts[0] == texts[1]
    assert narrow.width < wide.width


def prefix_of(model):
    encoder = model.transformer.prefix_encoder
    return [] if encoder is None else encoder(1, torch.float32)


def test_what_lies_behind_a_row_is_never_seen(model, prompts):
    prefix = prefix_of(model)
    clean, dirty = Batch(model, 3, 80), Batch(model, 3, 80)
    with torch.inference_mode():
        dirty._stores[0].fill_(1e6)
    texts = [feed(batch, batch.admit(prompts[:3], prefix).argmax(-1).tolist()) for batch in (clean, dirty)]
    assert texts[0] == texts[1]


def test_a_row_taken_from_the_cache_is_continued_by_another(model, prompts):
    batch = Batch(model, 2, 80)
    whole = feed(batch, batch.admit([prompts[0] + [5, 6, 7]], prefix_of(model)).argmax(-1).tolist())
    other = Batch(model, 2, 80)
    other.admit([prompts[1], prompts[0]], prefix_of(model))
    kept = [(key.clone(), value.clone()) for key, value in other.layers(1)]
    other.remove(0)
    other.remove(0)
    logits = other.admit([[5, 6, 7]], kept, prefix_length=model.prefix_length)
    assert feed(other, logits.argmax(-1).tolist()) == whole


# ---- CUDA graphs


class Recorded:
    """Stands for a CUDA graph: computes the step that was recorded again, in the same places."""

    def __init__(self, batch, rows, slots):
        self.step = lambda: Batch._decode(batch, rows, slots, padded=True)
        self.logits = self.step().clone()

    def replay(self):
        self.logits.copy_(self.step())


def with_graphs(monkeypatch, record):
    """Batches record their steps with `record(batch, rows, slots)`, without a GPU."""
    allocate = Batch.__init__

    def start(batch, *settings):
        allocate(batch, *settings)
        batch.graphs = {}

    monkeypatch.setattr(Batch, "__init__", start)
    monkeypatch.setattr(Batch, "_record", record)


def test_recorded_steps_are_padded_to_few_sizes_and_give_the_same_answers(model, prompts, expected, monkeypatch):
    sizes = []

    def record(batch, rows, slots):
        sizes.append((rows, slots))
        recorded = Recorded(batch, rows, slots)
        return recorded, recorded.logits

    with_graphs(monkeypatch, record)
    assert answer(model, prompts, 7) == expected
    assert len(sizes) == len(set(sizes)) <= 4  # of at most 7, 4, 2 and 1 rows


def test_where_steps_cannot_be_recorded_it_is_said_once_and_the_answers_are_the_same(
    model, prompts, expected, monkeypatch
):
    def record(batch, rows, slots):
        raise RuntimeError("operation not permitted when stream is capturing")

    with_graphs(monkeypatch, record)
    with pytest.warns(UserWarning, match="without CUDA graphs") as warned:
        assert answer(model, prompts, 5) == expected
    assert len([warning for warning in warned if "CUDA graphs" in str(warning.message)]) == 1


def test_a_recording_that_fails_once_is_tried_again(model, prompts, expected, monkeypatch, recwarn):
    failures = [RuntimeError("operation not permitted when stream is capturing")] * (CAPTURE_FAILURES - 1)
    recorded = []

    def record(batch, rows, slots):
        if failures:
            raise failures.pop()
        recorded.append(Recorded(batch, rows, slots))
        return recorded[-1], recorded[-1].logits

    with_graphs(monkeypatch, record)
    assert answer(model, prompts, 5) == expected
    assert recorded and not [warning for warning in recwarn if "CUDA graphs" in str(warning.message)]


def test_few_graphs_are_kept(model, prompts, expected, monkeypatch):
    monkeypatch.setattr("chatglm2.generation.MOST_GRAPHS", 2)
    monkeypatch.setattr("chatglm2.generation.WIDTH_STEP", 8)
    seen, kept = [], []

    def record(batch, rows, slots):
        recorded = Recorded(batch, rows, slots)
        seen.append((rows, slots))
        kept.append(len(batch.graphs) + 1)
        return recorded, recorded.logits

    with_graphs(monkeypatch, record)
    assert answer(model, prompts, 5) == expected
    assert len(set(seen)) > 2 and max(kept) == 2


def test_the_graph_not_used_for_longest_goes(model, monkeypatch):
    monkeypatch.setattr("chatglm2.generation.MOST_GRAPHS", 2)

    def record(batch, rows, slots):
        recorded = Recorded(batch, rows, slots)
        return recorded, recorded.logits

    with_graphs(monkeypatch, record)
    batch = Batch(model, 4, 64)
    batch.admit([[5], [6], [7]], [])
    for rows in (3, 2, 1):
        batch.step([5] * rows)
        if rows == 2:
            batch.admit([[8]], [])
            batch.step([5] * 3)  # the first graph again
            batch.remove(0)
        batch.remove(0)
    assert [rows for rows, _ in batch.graphs] == [4, 1]


def test_sizes_of_graphs_grow_by_a_quarter_beyond_512_slots():
    sizes = sorted({graph_slots(slots) for slots in range(1, 32769)})
    assert sizes[:8] == [64, 128, 192, 256, 320, 384, 448, 512] and len(sizes) < 30
    assert all(graph_slots(slots) >= slots for slots in range(1, 32769))
    assert all(large <= 1.4 * small for small, large in itertools.pairwise(sizes[7:]))


def test_a_recording_is_broken_by_no_other_thread_and_writes_to_memory_of_all_graphs(model, monkeypatch):
    modes, stream = [], contextlib.nullcontext()
    stream.wait_stream = lambda other: None

    def graph(graph, pool, capture_error_mode):
        modes.append(capture_error_mode)
        return contextlib.nullcontext()

    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: type("Graph", (), {"pool": lambda self: None, "replay": lambda self: None})(),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    batch = Batch(model, 2, 64)
    batch.graphs = {}
    batch.admit([[5, 6], [7]], [])
    first, second = batch._record(2, 64)[1], batch._record(1, 64)[1]
    assert modes == ["thread_local"] * 2
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_the_same_answers(model, prompts, expected):
    assert answer(model.to("cuda"), prompts, 5) == expected
    model.to("cpu")
