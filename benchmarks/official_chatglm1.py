"""Make the figures of tests/chatglm1.json again with the official code of the first ChatGLM-6B.

    PYTHONPATH=tests <python of the official environment> -m benchmarks.official_chatglm1 FOLDER > tests/chatglm1.json

FOLDER holds the official configuration_chatglm.py, modeling_chatglm.py, quantization.py and tokenization_chatglm.py of
ChatGLM-6B, and its ice_text.model. The environment has transformers 4.30.2, torch, sentencepiece and pytest. Nothing of
the official code is kept, only its figures.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from conftest import formula_weights
from support.small_chatglm1 import (
    CONFIG,
    PADDED_PROMPTS,
    PREFIX,
    SMALL_VOCABULARY,
    STEP_SIZE,
    STEPS,
    TEXTS,
    training_batch,
)

ANSWER = 10  # greedy tokens


def load_official(folder, name):
    """A module of the folder, of a package that exists for this process only."""
    package = sys.modules.setdefault("official", types.ModuleType("official"))
    package.__path__ = [str(folder)]
    return importlib.import_module(f"official.{name}")


def rounded(tensor):
    return [float(f"{number:.7g}") for number in tensor.detach().flatten().tolist()]


def official_model(folder, **settings):
    configuration, modeling = (load_official(folder, f"{name}_chatglm") for name in ("configuration", "modeling"))
    config = configuration.ChatGLMConfig(**{**CONFIG, "torch_dtype": torch.float32, **settings})
    model = modeling.ChatGLMForConditionalGeneration(config, empty_init=False).float().eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    model.load_state_dict(formula_weights(weights, 0.2, 0.1), strict=False)
    if config.pre_seq_len:
        model.transformer.dropout.p = 0.0
    return model


def left_padded(prompts, pad):
    """input_ids, both position ids and the mask (True: hidden) of prompts, as the official tokenizer pads them."""
    length = max(map(len, prompts))
    ids, positions, masks = [], [], []
    for prompt in prompts:
        missing, context = length - len(prompt), len(prompt) - 1
        ids.append([pad] * missing + prompt)
        positions.append([[0] * missing + [*range(context), context - 1], [0] * missing + [0] * context + [1]])
        mask = torch.ones(length, length, dtype=torch.bool)
        mask[missing:, missing : missing + context] = False
        mask[-1, -1] = False
        masks.append(mask[None])
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "attention_mask": torch.stack(masks),
    }


def answers(model):
    """Last logits of the prompts together, and greedy tokens of each: together and alone."""
    inputs = left_padded(PADDED_PROMPTS, CONFIG["pad_token_id"])
    greedy = {"do_sample": False, "eos_token_id": -1, "pad_token_id": CONFIG["pad_token_id"]}
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        together = model.generate(**inputs, max_length=inputs["input_ids"].shape[1] + ANSWER, **greedy)
        alone = [
            model.generate(torch.tensor([prompt]), max_length=len(prompt) + ANSWER, **greedy)[0, len(prompt) :].tolist()
            for prompt in PADDED_PROMPTS
        ]
    return {"last_logits": rounded(logits), "together": together[:, -ANSWER:].tolist(), "alone": alone}


def trajectory(model):
    """Losses of AdamW on the prefix."""
    optimizer = torch.optim.AdamW(model.transformer.prefix_encoder.parameters(), lr=STEP_SIZE)
    losses = []
    for step in range(STEPS):
        input_ids, labels = training_batch(step)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def figures_of_model(folder):
    input_ids, labels = training_batch()
    figures = {}
    for name, settings in {
        "base": {},
        "prefix": {"pre_seq_len": PREFIX},
        "projection": {"pre_seq_len": PREFIX, "prefix_projection": True},
    }.items():
        model = official_model(folder, **settings)
        output = model(input_ids=input_ids, labels=labels)
        output.loss.backward()
        figures[name] = {
            "loss": output.loss.item(),
            "logits": rounded(output.logits[:, ::6, ::5]),
            "gradients": {
                parameter: rounded(weight.grad.norm())[0]
                for parameter, weight in model.named_parameters()
                if weight.grad is not None
            },
            **answers(model),
            "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        }
        if settings:
            figures[name]["prefix_gradient"] = rounded(model.transformer.prefix_encoder.embedding.weight.grad[:, ::5])
            model.zero_grad()
            figures[name]["trajectory"] = trajectory(model)
    return figures


def figures_of_tokens(folder, vocabulary, **settings):
    """Ids that the official tokenizer has for texts, and the texts that it makes of them, special tokens left out."""
    tokenization = load_official(folder, "tokenization_chatglm")
    tokenizer = tokenization.ChatGLMTokenizer(str(vocabulary), **settings)
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {"ids": ids, "decoded": [tokenizer.decode(row[:-2]) for row in ids]}


if __name__ == "__main__":
    folder = sys.argv[1]
    figures = {
        "model": figures_of_model(folder),
        "tokens": figures_of_tokens(folder, Path(folder) / "ice_text.model", num_image_tokens=0),
        "small": figures_of_tokens(folder, SMALL_VOCABULARY, num_image_tokens=0),
        "images": figures_of_tokens(folder, SMALL_VOCABULARY),
    }
    json.dump(figures, sys.stdout, ensure_ascii=False)
    print()
