"""How far answers on a CPU are from exact ones, for each way to compute them: logits and greedy tokens.

    PYTHONPATH=ptuning python -m benchmarks.rounding --model FOLDER --rows FILE

Each way is held against the same weights multiplied in float32 without rounding: int4 and int8 against the integers that
`--quantization_backend torch` multiplies, the int8 head against the float32 one of the same blocks. The exact model answers
the prompts of --rows greedily; the others are fed its tokens. `logits` is the norm of the difference over that of the exact
logits, `tokens` the share of steps at which another token is the likeliest, `answers` how many have such a step: so many
greedy answers change.
"""

import argparse
from pathlib import Path

import torch

from chatglm2.generation import Batch
from checkpoint import load_model, load_tokenizer, read_config
from data.encoding import encode_prediction
from data.examples import load_examples

ROOT = Path(__file__).resolve().parents[1]
EXACT = {"quantization_backend": "torch"}
HEAD, HALF = {"quantize_output_layer": True}, {"dtype": torch.bfloat16}
WAYS = {  # name: (bits, how load_model makes it)
    "bfloat16": (None, HALF),
    "int8": (8, {}),
    "int8, int8 head": (8, HEAD),
    "int8, bfloat16": (8, HALF),
    "int4": (4, {}),
    "int4, int8 head": (4, HEAD),
    "int4, bfloat16": (4, HALF),
}


@torch.inference_mode()
def logits_along(model, prompts, count, tokens=None):
    """Logits (count, rows, V) of `count` steps behind `prompts`, fed `tokens` (count, rows) or the likeliest ones."""
    batch = Batch(model, len(prompts), max(map(len, prompts)) + count)
    found = [batch.admit(prompts, [])]
    for step in range(count - 1):
        fed = found[-1].argmax(-1) if tokens is None else tokens[step]
        found.append(batch.step(fed.tolist()).clone())
    return torch.stack(found).float()


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "ptuning/tiny", help="folder of a base model")
    parser.add_argument("--rows", default=ROOT / "AdvertiseGen/sample/dev.json", help="rows with content and summary")
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--at_once", type=int, default=8, help="rows of a batch; the fast kernels take up to 32")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model, read_config(args.model, pre_seq_len=None))
    examples, _ = load_examples(args.rows, "content", "summary", max_samples=args.answers)
    encoded = encode_prediction(examples, tokenizer, max_source_length=64, max_target_length=128)
    prompts = [row["input_ids"] for row in encoded]
    print(f"{len(prompts)} answers of {args.new_tokens} tokens, {args.at_once} at once, {Path(args.model).name}\n")
    print("| weights | logits | tokens | answers |\n|---|---|---|---|")
    exact = {}
    for name, (bits, how) in WAYS.items():
        if bits not in exact:
            exact = {bits: load_model(args.model, quantization_bit=bits, **EXACT)}
        model = load_model(args.model, quantization_bit=bits, **how)
        difference = size = steps = tokens = answers = 0.0
        for start in range(0, len(prompts), args.at_once):
            some = prompts[start : start + args.at_once]
            expected = logits_along(exact[bits], some, args.new_tokens)
            likeliest = expected.argmax(-1)
            logits = logits_along(model, some, args.new_tokens, likeliest)
            ends = (likeliest == tokenizer.eos_token_id).long()
            written = ends.cumsum(0) == ends  # (steps, rows): up to the end of each answer
            changed = (logits.argmax(-1) != likeliest) & written
            difference += (logits - expected)[written].square().sum(dtype=torch.float64).item()
            size += expected[written].square().sum(dtype=torch.float64).item()
            steps += written.sum().item()
            tokens, answers = tokens + changed.sum().item(), answers + changed.any(0).sum().item()
        print(f"| {name} | {(difference / size) ** 0.5:.4f} | {tokens / steps:.2%} | {answers:.0f} |", flush=True)


if __name__ == "__main__":
    main()
