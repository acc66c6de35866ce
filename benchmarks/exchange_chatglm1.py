"""Let the official code of the first ChatGLM-6B answer with a prefix that was trained here, and compare the numbers.

    <python of the official environment> -m benchmarks.exchange_chatglm1 BASE CHECKPOINT --official FOLDER > figures.json
    PYTHONPATH=ptuning python -m benchmarks.exchange_chatglm1 BASE CHECKPOINT --compare figures.json

BASE is a folder of ChatGLM-6B, CHECKPOINT what `train.sh` has made of it, in float32. FOLDER and the official environment
are those of official_chatglm1.py.
"""

import argparse
import json
import sys
import types
from pathlib import Path

import torch

PROMPTS, LENGTH, ANSWER = 3, 12, 12  # tokens of each prompt, and of each greedy answer
PREFIX_KEY = "transformer.prefix_encoder."


def prompts_of(config):
    """Ordinary tokens at random and the two that end a prompt, (PROMPTS, LENGTH + 2)."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([[config["gmask_token_id"], config["bos_token_id"]]]).expand(PROMPTS, -1)
    return torch.cat((torch.randint(20, 200, (PROMPTS, LENGTH), generator=generator), ends), dim=1)


def figures_of(model, prompts):
    """The logits and greedy answers that a model of either code gives."""
    greedy = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 3, "max_length": prompts.shape[1] + ANSWER}
    with torch.no_grad():
        logits = model(input_ids=prompts).logits
        answers = [model.generate(prompt[None], **greedy)[0, len(prompt) :].tolist() for prompt in prompts]
    return {"logits": logits.float().flatten().tolist(), "answers": answers}


def official_model(folder, base, checkpoint):
    """The official model, filled as the official main.py fills it."""
    import importlib

    package = sys.modules.setdefault("official", types.ModuleType("official"))
    package.__path__ = [str(folder)]
    configuration, modeling = (
        importlib.import_module(f"official.{name}_chatglm") for name in ("configuration", "modeling")
    )
    prefix = torch.load(checkpoint / "pytorch_model.bin")
    prefix = {name.removeprefix(PREFIX_KEY): tensor for name, tensor in prefix.items() if name.startswith(PREFIX_KEY)}
    settings = json.loads((base / "config.json").read_text())
    shape = {"pre_seq_len": len(prefix["embedding.weight"]), "prefix_projection": "trans.0.weight" in prefix}
    config = configuration.ChatGLMConfig(**{**settings, **shape, "torch_dtype": torch.float32})
    model = modeling.ChatGLMForConditionalGeneration(config, empty_init=False).float().eval()
    weights = torch.load(base / "pytorch_model.bin")
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in weights.items()}, strict=False
    )
    assert not unexpected and all(name.startswith(PREFIX_KEY) for name in missing), (missing, unexpected)
    model.transformer.prefix_encoder.load_state_dict(prefix)
    return model


def own_models(base, checkpoint):
    """The model here with the prefix, and without."""
    from checkpoint import load_model, load_prefix, read_config, read_prefix_settings

    settings = read_prefix_settings(checkpoint)
    shape = {name: settings[name] for name in ("pre_seq_len", "prefix_projection")}
    model = load_model(base, config=read_config(base, **shape))
    load_prefix(model, checkpoint)
    return model, load_model(base)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--official", type=Path, help="Folder of the official code: print its figures.")
    parser.add_argument("--compare", type=Path, help="Those figures: compare them with the ones here.")
    args = parser.parse_args()
    prompts = prompts_of(json.loads((args.base / "config.json").read_text()))
    if args.official:
        json.dump(figures_of(official_model(args.official, args.base, args.checkpoint), prompts), sys.stdout)
    else:
        expected = json.loads(args.compare.read_text())
        for name, model in zip(("with", "without"), own_models(args.base, args.checkpoint), strict=True):
            found = figures_of(model, prompts)
            logits, other = (torch.tensor(figures["logits"]) for figures in (found, expected))
            difference = ((logits - other).norm() / other.norm()).item()
            same = sum(mine == theirs for mine, theirs in zip(found["answers"], expected["answers"], strict=True))
            print(
                f"{name} the prefix here: {len(logits)} logits differ by {difference:.1e}, {same} of {PROMPTS} answers equal"
            )
