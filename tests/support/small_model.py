"""The small model of the reference data."""

import pytest
import torch
from conftest import SYNTHETIC, synthetic_model

LEFT_PADDED = {
    name: torch.tensor(SYNTHETIC["left_padded"][name]) for name in ("input_ids", "attention_mask", "position_ids")
}
ENDLESS = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def model():
    return synthetic_model()


def generate(model, **settings):
    inputs = {**LEFT_PADDED, **{key: settings.pop(key) for key in list(settings) if key in LEFT_PADDED}}
    inputs = {key: value for key, value in inputs.items() if value is not None}
    output = model.generate(**inputs, **{**ENDLESS, **settings})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def batch():
    return torch.tensor(SYNTHETIC["input_ids"]), torch.tensor(SYNTHETIC["labels"])
