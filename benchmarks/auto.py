"""Who answers under `auto`: which share of adverts and of general prompts goes to the base, by a run's signature.

    MODEL=tiny bash train.sh
    PYTHONPATH=ptuning python -m benchmarks.auto output/adgen-tiny-pt-32-2e-2
    PYTHONPATH=ptuning python -m benchmarks.auto RUN --data ../shared/AdvertiseGen --general ptuning/forgetting/general.jsonl

`nearest` and `farthest` are distances of prompts; up to 1 the prefix answers. What the answers are worth is in the table of
`benchmarks.forgetting`, beside what training keeps.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

from arguments import add_model_arguments
from checkpoint import choose_device, choose_dtype, load_model, load_tokenizer, resolve_folder
from checkpoints.run_folder import find_checkpoints
from checkpoints.sidecar import read_sidecar
from data.general import read_general
from evaluation.metrics import score_all
from forgetting.answers import answers_of
from forgetting.drift import Drift
from forgetting.trainer import MEASURED_TOKENS
from serving.loading import load_server
from serving.server import Sampling
from tuning.signature import prompt_means, read_signature
from tuning.swapping import load_beside, swapped, untouched

SAMPLE = Path(__file__).resolve().parents[1] / "AdvertiseGen/sample"
AT_ONCE = 60
GREEDY = Sampling(max_new_tokens=64, temperature=0)
MOST_ADVERTS = 240


def rows_of(file):
    """(question, history, reference or None) of each row of a file."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return [
        (row.get("prompt") or row["content"], row.get("history", []), row.get("response") or row.get("summary"))
        for row in rows
    ]


def lists_attributes(row):
    """True where a row's question, or what was said before it, has a list of attributes as the adverts' prompts do."""
    return "#" in row[0] or any("#" in text for turn in row[1] for text in turn)


def open_server(checkpoint, *words):
    """A ChatServer of a checkpoint, which may also decide by itself."""
    flags = argparse.ArgumentParser()
    add_model_arguments(flags)
    words = ["--ptuning_checkpoint", checkpoint, "--auto", "--concurrency", AT_ONCE, *words]
    return load_server(flags.parse_args([str(word) for word in words]), say=lambda line: None)


def ended_answers(server, rows, model):
    """The ended Answer to each row, in their order."""
    found = []
    for start in range(0, len(rows), AT_ONCE):
        prompts = [server.encode(question, history, model) for question, history, _ in rows[start : start + AT_ONCE]]
        streams = [server.stream(prompt, model=model, sampling=GREEDY) for prompt in prompts]
        for stream in streams:
            *_, answer = stream
            found.append(answer)
    return found


def bleu(texts, rows):
    """BLEU-4 of the answers to rows, None where they have no references."""
    return score_all(texts, [row[2] for row in rows])["bleu-4"] if rows and rows[0][2] else None


def forgotten_by_auto(args, checkpoint):
    """{"drift", "same_answers"} over the prompts that a run of main.py measures, where auto decides who answers each."""
    folder, device = resolve_folder(str(args.model)), choose_device()
    how = {"dtype": choose_dtype(device)[0], "device": device, "quantization_bit": args.quantization_bit or None}
    model = load_model(folder, **how).requires_grad_(False)
    tokenizer, tuned = load_tokenizer(folder, model.config), load_beside(model, checkpoint)
    columns = {"prompt_column": "content", "history_column": None, "messages_column": None, "source_prefix": ""}
    lengths = {"max_source_length": args.max_source_length, "max_target_length": 64}
    data_args = SimpleNamespace(**columns, **lengths)
    prompts = read_general(args.general, data_args, tokenizer, model.config.seq_length, lambda line: None).measured.ids
    with untouched(model):
        answers = answers_of(model, prompts, MEASURED_TOKENS, len(tokenizer), tokenizer.stop_ids)
        means = prompt_means(model, [tokenizer.last_turn(prompt) for prompt in prompts])
    distances = read_signature(checkpoint, model.config.hidden_size).distance(means)
    chosen = [index for index, distance in enumerate(distances.tolist()) if distance <= 1]
    if not chosen:
        return {"drift": 0.0, "same_answers": 1.0}
    asked, answered = ([rows[index] for index in chosen] for rows in (prompts, answers))
    with swapped(model, tuned):
        drift = Drift(model, asked, answered, num_known=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        found = drift.measure()
    others = len(prompts) - len(chosen)  # which the base answers
    return {
        "drift": found["drift"] * sum(map(len, answered)) / sum(map(len, answers)),
        "same_answers": (found["same_answers"] * len(chosen) + others) / len(prompts),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="A checkpoint of adverts, or its run.")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder with dev.json of adverts")
    general = [SAMPLE / "general_dev.json", SAMPLE / "general.json"]
    parser.add_argument("--general", nargs="+", default=general, help="files of general prompts")
    words = parser.parse_args()
    checkpoint = find_checkpoints(words.checkpoint)[0][-1]
    folder = resolve_folder(read_sidecar(checkpoint)["base_model"])
    model = load_model(folder).eval()
    tokenizer, signature = load_tokenizer(folder, model.config), read_signature(checkpoint, model.config.hidden_size)
    general = [row for file in words.general for row in rows_of(file)]
    kinds = {
        "held-out adverts": rows_of(words.data / "dev.json")[:MOST_ADVERTS],
        "general, without a list of attributes": [row for row in general if not lists_attributes(row)],
        "general, with one": [row for row in general if lists_attributes(row)],
    }
    print("| prompts | number | answered by the base | nearest | farthest |\n|---|---|---|---|---|")
    for kind, rows in kinds.items():
        if rows:
            prompts = [tokenizer.encode_prompt(question, history) for question, history, _ in rows]
            found = signature.distance(prompt_means(model, [tokenizer.last_turn(ids) for ids in prompts]))
            cells = [kind, len(rows), f"{(found > 1).double().mean():.1%}", f"{found.min():.2f}", f"{found.max():.2f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
