"""Make the figures of tests/families.json and tests/chatglm3_tokens.npz again with the official code of a model.

    PYTHONPATH=tests <python of the official environment> -m benchmarks.official_families model FOLDER --rope_ratio 16
    PYTHONPATH=tests <python of the official environment> -m benchmarks.official_families tokens FOLDER \
        --finetune finetune_hf.py

FOLDER holds the official configuration_chatglm.py, modeling_chatglm.py, quantization.py and tokenization_chatglm.py,
for `tokens` tokenizer.model and tokenizer_config.json, too. The environment has transformers 4.30.2, torch,
sentencepiece and pytest. `--rotary_from FILE` takes the class RotaryEmbedding from another official
modeling_chatglm.py: the file of ChatGLM3-6B-32k differs from that of ChatGLM3-6B in this class. `--finetune` is the
fine-tuning of ChatGLM3's own repository, whose process_batch makes the labels of dialogues without tools; those of the
others follow the rule in its README. Nothing of the official code is kept, only its figures.
"""

import argparse
import importlib
import json
import re
import sys
import types
from pathlib import Path

import numpy
import torch
from conftest import OFFICIAL_FIELDS, SYNTHETIC, formula_weights
from support.dialogues import ANSWERED, dialogues

ROWS, LENGTH, ANSWER, EVERY = 2, 40, 12, 8  # rows of so many tokens; greedy tokens; logits kept of every n-th place


def load_official(folder, name):
    """A module of the folder, of a package that exists for this process only."""
    package = sys.modules.setdefault("official", types.ModuleType("official"))
    package.__path__ = [str(folder)]
    return importlib.import_module(f"official.{name}")


def taken_from(file, kind, name, names):
    """A class or function of an official file, run alone with `names` around it."""
    found = re.search(rf"^{kind} {name}\b.*?(?=^(?:@|#|class |def ))", Path(file).read_text(), re.M | re.S)
    names = dict(names)
    exec(compile(found[0], str(file), "exec"), names)
    return names[name]


def figures_of_model(folder, rope_ratio, rotary_from):
    configuration, modeling = (load_official(folder, f"{name}_chatglm") for name in ("configuration", "modeling"))
    settings = {**OFFICIAL_FIELDS, **SYNTHETIC["config"], "seq_length": 128, "torch_dtype": torch.float32}
    settings["original_rope"] = True
    if rope_ratio != 1:
        settings["rope_ratio"] = rope_ratio
    if rotary_from:
        rotary = taken_from(rotary_from, "class", "RotaryEmbedding", vars(modeling))
        modeling.RotaryEmbedding = lambda *args, **kwargs: rotary(*args, rope_ratio=rope_ratio, **kwargs)
    config = configuration.ChatGLMConfig(**settings)
    config.use_cache = True
    model = modeling.ChatGLMForConditionalGeneration(config, empty_init=False).float().eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    model.load_state_dict(formula_weights(weights, 0.2, 0.1), strict=False)
    generator = numpy.random.default_rng(21)
    input_ids = torch.from_numpy(generator.integers(3, settings["padded_vocab_size"], (ROWS, LENGTH)))
    labels = input_ids.clone()
    labels[0, :25] = labels[1, :31] = -100
    output = model(input_ids=input_ids, labels=labels, return_dict=True)
    output.loss.backward()
    # With everything known before, so that beams and caches are official.
    greedy = model.generate(input_ids[:1], do_sample=False, max_length=LENGTH + ANSWER, eos_token_id=-1)
    return {
        "rope_ratio": rope_ratio,
        "input_ids": input_ids.tolist(),
        "labels": labels.tolist(),
        "loss": output.loss.item(),
        "logits": rounded(output.logits[:, ::EVERY].detach()),
        "prefix_grad": rounded(model.transformer.prefix_encoder.embedding.weight.grad),
        "greedy": greedy[0, LENGTH:].tolist(),
    }


def rounded(tensor):
    return [float(f"{number:.7g}") for number in tensor.flatten().tolist()]


def figures_of_tokens(folder, finetune):
    """The official ids of each of dialogues() as build_chat_input() gives them, and ids and labels for training on it."""
    tokenization = load_official(folder, "tokenization_chatglm")
    tokenizer = tokenization.ChatGLMTokenizer(str(Path(folder) / "tokenizer.model"))
    names = {"Mapping": dict, "Sequence": list, "PreTrainedTokenizer": object}
    process_batch = taken_from(finetune, "def", "process_batch", {**names, "dict": dict})
    found = {"prompts": [], "input_ids": [], "labels": [], "own": []}
    for query, history, role in dialogues():
        prompt = tokenizer.build_chat_input(query, history=history, role=role)["input_ids"][0].tolist()
        conversation = [*history, {"role": role, "content": query}, {"role": "assistant", "content": ANSWERED}]
        simple = all(
            each["role"] != "observation" and not each.get("metadata") and "tools" not in each for each in conversation
        )
        if simple:
            batch = process_batch({"conversations": [conversation]}, tokenizer, 10**6, 10**6)
            input_ids, labels = batch["input_ids"][0], batch["labels"][0]
        else:
            input_ids, labels = labels_by_the_rule(tokenizer, conversation)
        for name, value in zip(found, (prompt, input_ids, labels, [int(simple)]), strict=True):
            found[name].append(value)
    return found


def labels_by_the_rule(tokenizer, conversation):
    """Loss on what an assistant says, metadata included, and on the token behind it."""
    input_ids, learned = tokenizer.get_prefix_tokens(), [False, False]
    for message in conversation:
        content = message["content"]
        if "tools" in message:
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        ids = tokenizer.build_single_message(message["role"], message.get("metadata", ""), content)
        input_ids += ids
        learned += [message["role"] == "assistant"] * len(ids)
    input_ids.append(tokenizer.eos_token_id)
    return input_ids, [token if known else -100 for token, known in zip(input_ids, [False, *learned], strict=True)]


def write_rows(file, rows):
    """{name: lists of numbers} as an .npz file of flat arrays and lengths."""
    arrays = {}
    for name, lists in rows.items():
        arrays[name] = numpy.concatenate([numpy.array(row, dtype=numpy.int32) for row in lists])
        arrays[f"{name}_lengths"] = numpy.array(list(map(len, lists)), dtype=numpy.int32)
    numpy.savez_compressed(file, **arrays)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["model", "tokens"])
    parser.add_argument("folder")
    parser.add_argument("--rope_ratio", type=int, default=1)
    parser.add_argument("--rotary_from")
    parser.add_argument("--finetune")
    parser.add_argument("--output", default="tests/chatglm3_tokens.npz", help="for tokens")
    args = parser.parse_args(argv)
    if args.what == "tokens":
        write_rows(args.output, figures_of_tokens(args.folder, args.finetune))
    else:
        print(json.dumps(figures_of_model(args.folder, args.rope_ratio, args.rotary_from)))


if __name__ == "__main__":
    main(sys.argv[1:])
