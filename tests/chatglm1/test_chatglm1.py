"""The first ChatGLM-6B: equal to the official code's figures, and to itself."""

import json

import pytest
import torch
from conftest import ROOT, formula_weights, relative_difference
from support.small_chatglm1 import CONFIG, PADDED_PROMPTS, PREFIX, STEP_SIZE, STEPS, left_padded, training_batch

from chatglm1.configuration_chatglm import ChatGLMConfig
from chatglm1.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm1.weight_names import official_name, own_name
from chatglm2.generation import Batch, answer_prompts

FIGURES = json.loads((ROOT / "tests" / "chatglm1.json").read_text())["model"]
SETTINGS = {
    "base": {},
    "prefix": {"pre_seq_len": PREFIX},
    "projection": {"pre_seq_len": PREFIX, "prefix_projection": True},
}


def small_model(**settings):
    """The model that the official figures are of: weights by their official names, dropout off, in eval mode."""
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**CONFIG, "prefix_dropout": 0.0, **settings}))
    own = model.state_dict()
    weights = formula_weights({official_name(name): tensor for name, tensor in own.items()}, 0.2, 0.1)
    model.load_state_dict({name: weights[official_name(name)] for name in own})
    return model.eval()


@pytest.fixture(scope="module", params=SETTINGS)
def case(request):
    """(official figures, model)."""
    return FIGURES[request.param], small_model(**SETTINGS[request.param])


def test_loss_logits_and_gradients_are_the_official_ones(case):
    figures, model = case
    input_ids, labels = training_batch()
    model.zero_grad()
    output = model(input_ids, labels=labels)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(figures["loss"], rel=2e-5)
    assert relative_difference(output.logits[:, ::6, ::5].flatten(), figures["logits"]) < 1e-4
    norms = {
        official_name(name): weight.grad.norm() for name, weight in model.named_parameters() if weight.grad is not None
    }
    expected = {
        name: norm for name, norm in figures["gradients"].items() if name in norms
    }  # it trains lm_head beside a prefix
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        assert norms[name].item() == pytest.approx(norm, rel=2e-4), name
    if "prefix_gradient" in figures:
        gradient = model.transformer.prefix_encoder.embedding.weight.grad[:, ::5].flatten()
        assert relative_difference(gradient, figures["prefix_gradient"]) < 1e-4


def test_the_loss_of_training_is_that_of_evaluation(case):
    model = case[1]
    input_ids, labels = training_batch()
    expected = model(input_ids, labels=labels).loss
    model.train()
    assert model(input_ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    model.eval()


@pytest.mark.parametrize("name", ["prefix", "projection"])
def test_twelve_steps_of_training_a_prefix_are_the_official_ones(name):
    model = small_model(**SETTINGS[name]).train()
    optimizer = torch.optim.AdamW(model.transformer.prefix_encoder.parameters(), lr=STEP_SIZE)
    losses = []
    for step in range(STEPS):
        input_ids, labels = training_batch(step)
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(FIGURES[name]["trajectory"], rel=1e-4)


def test_logits_of_left_padded_prompts_are_the_official_ones(case):
    figures, model = case
    logits = model(**left_padded(PADDED_PROMPTS)).logits[:, -1]
    assert relative_difference(logits.flatten(), figures["last_logits"]) < 1e-4


@pytest.mark.parametrize(
    "settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}], ids=str
)
def test_greedy_tokens_of_generate_are_the_official_ones_with_every_cache(case, settings):
    figures, model = case
    inputs = left_padded(PADDED_PROMPTS)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "disable_compile": True, **settings}
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert together.tolist() == figures["together"]
    alone = [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PADDED_PROMPTS]
    assert alone == figures["alone"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_answers_are_the_official_ones_whatever_rows_are_computed_together(case, batch_size):
    figures, model = case
    answers = answer_prompts(
        model, PADDED_PROMPTS, 200, num_known=300, batch_size=batch_size, rows=range(3), max_answer=10
    )
    assert answers == figures["alone"]


def test_rows_that_come_and_go_keep_their_own_prompts():
    model = small_model(pre_seq_len=PREFIX)
    limits = [7, 2, 10, 5]
    prompts = [*PADDED_PROMPTS, PADDED_PROMPTS[1]]
    alone = [
        answer_prompts(model, [prompt], 200, num_known=300, batch_size=1, rows=[0], max_answer=limit)[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    batch = Batch(model, 3)
    prefix = model.transformer.prefix_encoder(1, torch.float32)
    logits, rows, answers = batch.admit(prompts[:3], prefix), [0, 1, 2], [[] for _ in prompts]
    while rows:
        for row, token_id in zip(rows, logits.argmax(-1).tolist(), strict=True):
            answers[row].append(token_id)
        for place in reversed(range(len(rows))):
            if len(answers[rows[place]]) == limits[rows[place]]:
                batch.remove(place)
                rows[place] = rows[-1]
                rows.pop()
        if not answers[3] and len(rows) == 2:
            answers[3].append(batch.admit([prompts[3]], prefix).argmax(-1).item())
            rows.append(3)
        if rows:
            logits = batch.step([answers[row][-1] for row in rows])
    assert answers == alone


def test_a_cached_step_gives_the_logits_of_the_whole_row(case):
    model = case[1]
    row = torch.tensor([PADDED_PROMPTS[0] + [17, 33, 90]])
    whole = model(row).logits
    cache = model(row[:, :-3], use_cache=True).past_key_values
    for place in (-3, -2, -1):
        step = model(row[:, place : row.shape[1] + place + 1], past_key_values=cache, use_cache=True).logits
        assert relative_difference(step[:, -1], whole[:, place]) < 1e-5


def test_tokens_of_a_prompt_see_all_of_it_and_nothing_behind():
    model = small_model()
    prompt = PADDED_PROMPTS[0]
    changed = [prompt[0], *[token + 1 for token in prompt[1:3]], *prompt[3:]]
    hidden = [model.transformer(torch.tensor([row])).last_hidden_state[0] for row in (prompt, changed, [*prompt, 9])]
    assert relative_difference(hidden[1][0], hidden[0][0]) > 0.01
    assert relative_difference(hidden[2][:-1], hidden[0]) < 1e-5


def test_half_precision_stays_close(case):
    model = case[1]
    inputs = left_padded(PADDED_PROMPTS)
    expected = model(**inputs).logits[:, -1]
    assert (
        relative_difference(
            small_model(
                **{"pre_seq_len": model.config.pre_seq_len, "prefix_projection": model.config.prefix_projection}
            )
            .bfloat16()(**inputs)
            .logits[:, -1],
            expected,
        )
        < 0.1
    )


def test_a_row_without_the_end_of_its_prompt_is_refused():
    with pytest.raises(ValueError, match="no \\[gMASK\\] <sop>"):
        small_model()(torch.tensor([[5, 6, 7]]), use_cache=True)


def test_a_blank_row_changes_nothing_of_the_others():
    model = small_model().train()
    input_ids, labels = training_batch()
    blank = torch.zeros(1, input_ids.shape[1], dtype=torch.int64)
    padded = model(torch.cat((input_ids, blank)), labels=torch.cat((labels, blank - 100))).loss
    assert padded.item() == pytest.approx(model(input_ids, labels=labels).loss.item(), rel=1e-6)


def test_every_name_of_a_weight_goes_to_its_own_name_and_back():
    names = list(small_model(**SETTINGS["projection"]).state_dict())
    official = [official_name(name) for name in names]
    assert [own_name(name) for name in official] == names
    assert "transformer.layers.2.attention.query_key_value.bias" in official and "lm_head.weight" in official
    assert own_name("transformer.layers.0.attention.rotary_emb.inv_freq") is None
