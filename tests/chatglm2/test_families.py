"""The models of the family compute what the official code of each computed (benchmarks/official_families.py)."""

import json

import pytest
import torch
from conftest import OFFICIAL_FIELDS, ROOT, SYNTHETIC, formula_model, relative_difference

FIGURES = json.loads((ROOT / "tests" / "families.json").read_text())
EVERY = 8  # the logits of every n-th place are kept


@pytest.mark.parametrize("name", FIGURES)
def test_logits_loss_prefix_gradient_and_greedy_tokens_equal_the_official_figures(name):
    from families import BY_NAME

    official = FIGURES[name]
    family = BY_NAME[name.removesuffix("-32k")]
    settings = {**OFFICIAL_FIELDS, **SYNTHETIC["config"], "seq_length": 128, "rope_ratio": official["rope_ratio"]}
    model = formula_model(settings, 0.2, 0.1, config_class=family.configuration_class)
    input_ids, labels = (torch.tensor(official[key]) for key in ("input_ids", "labels"))
    output = model(input_ids, labels=labels)
    output.loss.backward()
    gradient = model.transformer.prefix_encoder.embedding.weight.grad.flatten()
    assert output.loss.item() == pytest.approx(official["loss"], rel=1e-5)
    assert relative_difference(output.logits[:, ::EVERY].detach().flatten(), official["logits"]) < 1e-5
    assert relative_difference(gradient, official["prefix_grad"]) < 1e-5
    length = input_ids.shape[1]
    answer = model.generate(input_ids[:1], do_sample=False, max_new_tokens=len(official["greedy"]), eos_token_id=-1)
    assert answer[0, length:].tolist() == official["greedy"]


def test_rope_ratio_is_read_in_another_way_in_chatglm3():
    losses = {name: FIGURES[name]["loss"] for name in ("chatglm2-32k", "chatglm3-32k", "chatglm3")}
    assert len({round(loss, 3) for loss in losses.values()}) == 3
