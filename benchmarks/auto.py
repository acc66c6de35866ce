"""Who answers under `auto`, and how well: shares and scores of base, prefix and auto on adverts and general rows.

MODEL=tiny bash train.sh
PYTHONPATH=ptuning python -m benchmarks.auto output/adgen-tiny-pt-32-2e-2
"""

import argparse
import json
from pathlib import Path

from arguments import add_model_arguments
from evaluation.metrics import score_all
from serving.auto import AUTO
from serving.loading import load_server
from serving.server import Sampling

SAMPLE = Path(__file__).resolve().parents[1] / "AdvertiseGen" / "sample"
AT_ONCE = 60
GREEDY = Sampling(max_new_tokens=64, temperature=0)


def rows_of(name):
    """(question, history, reference) of each row of a file of the sample."""
    rows = [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]
    return [
        (row.get("prompt") or row["content"], row.get("history", []), row.get("response") or row["summary"])
        for row in rows
    ]


def lists_attributes(row):
    """True where a row's question, or what was said before it, has a list of attributes as the adverts' prompts do."""
    return "#" in row[0] or any("#" in text for turn in row[1] for text in turn)


def answers_of(server, rows, model):
    """The ended Answer to each row, in their order."""
    found = []
    for start in range(0, len(rows), AT_ONCE):
        prompts = [server.encode(question, history, model) for question, history, _ in rows[start : start + AT_ONCE]]
        streams = [server.stream(prompt, model=model, sampling=GREEDY) for prompt in prompts]
        for stream in streams:
            *_, answer = stream
            found.append(answer)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="A checkpoint of the sample's adverts, or its run.")
    words = parser.parse_args()
    flags = argparse.ArgumentParser()
    add_model_arguments(flags)
    server = load_server(flags.parse_args(["--ptuning_checkpoint", words.checkpoint, "--concurrency", str(AT_ONCE)]))
    general = rows_of("general_dev.json")
    kinds = {
        "adverts": rows_of("dev.json"),
        "general": general,
        "general without a list": [row for row in general if not lists_attributes(row)],
        "general with a list": [row for row in general if lists_attributes(row)],
    }
    print("| rows | model | answered by the base | BLEU-4 | ROUGE-L |\n|---|---|---|---|---|")
    for kind, rows in kinds.items():
        for model in (server.base, server.default, AUTO):
            answers = answers_of(server, rows, model)
            scores = score_all([answer.text for answer in answers], [reference for *_, reference in rows])
            share = sum(answer.model == server.base for answer in answers) / len(answers)
            cells = [kind, model, f"{share:.1%}", f"{scores['bleu-4']:.2f}", f"{scores['rouge-l']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    server.close()


if __name__ == "__main__":
    main()
