"""The answers to the rows of a split: made, written, scored.

Answers to the end of the official `main.py`: the same files and keys. chatglm2/generation.py makes the answers,
metrics.py scores them.
"""

import json
from pathlib import Path

import torch

from checkpoints.run_folder import dev_loss_of
from common.failure import going_on_without
from common.files import ANSWERS_FILE, write_text
from common.messages import cut_short
from common.plots import plot_checkpoints
from common.ranks import on_first_rank
from common.slowness import slow_because
from evaluation.metrics import metric_table, score_all
from tuning.methods import load_trained


def describe_prompts(split, dataset, skipped, max_source_length):
    """Text on the rows of a split that are answered: how many, how many `skipped`, and how many lose turns."""
    lines = [f"{split}: {len(dataset)} rows, {skipped} skipped (empty prompt)."]
    if shortened := sum(turns > 0 for turns in dataset["dropped_turns"]):
        lines.append(f"{shortened} of them lose their oldest turns at --max_source_length {max_source_length}.")
    return "\n".join(lines)


def predict(trainer, tokenizer, datasets: dict) -> dict[str, float]:
    """Answer the rows of every split; the metrics of all, on the process that writes."""
    metrics = {}
    for split, dataset in datasets.items():
        answers = trainer.predict(dataset, metric_key_prefix=split)
        if trainer.args.should_save:
            metrics.update(report_predictions(trainer, tokenizer, split, dataset, answers))
    return metrics


def predict_with_each(checkpoints: list[Path], trainer, tokenizer, datasets: dict) -> None:
    """Answer and score the rows of every split with each checkpoint of a run; write a table and a plot of the scores.

    What a checkpoint gives goes to all_checkpoints/<its name>, the table and the plot to all_checkpoints.
    """
    output_dir = trainer.args.output_dir
    folder = Path(output_dir) / "all_checkpoints"
    table = {}
    for checkpoint in checkpoints:
        trainer.say(f"\n{checkpoint.name} of {checkpoints[-1].name}")
        load_trained(trainer.model, checkpoint, trainer.sidecar["finetuning_type"])
        trainer.args.output_dir = str(folder / checkpoint.name)
        with torch.random.fork_rng():  # each starts with the same random numbers
            metrics = predict(trainer, tokenizer, datasets)
        scores = {name: value for name, value in metrics.items() if "bleu" in name or "rouge" in name}
        dev_loss = dev_loss_of(checkpoint)
        table[checkpoint.name] = {**({} if dev_loss is None else {"dev_loss": dev_loss}), **scores}
    trainer.args.output_dir = output_dir
    if trainer.args.should_save:
        text = checkpoint_table(table)
        write_text(folder / "table.txt", text + "\n")
        with going_on_without(folder / "scores.png", trainer.say):
            plot_checkpoints(table, folder / "scores.png")
        trainer.say(f"\n{text}\nThis table, a plot, and each one's answers and metrics are in {folder}.")


def checkpoint_table(table):
    """One line for each checkpoint of {"checkpoint-100": {"dev_loss": 0.6, "predict_bleu-4": 20.1, …}, …}."""
    columns = list(dict.fromkeys(name for scores in table.values() for name in scores))
    width = max(map(len, table))
    lines = [" " * width + "".join(f"  {column}" for column in columns)]
    for name, scores in table.items():
        cells = [f"{scores[column]:.4f}" if column in scores else "-" for column in columns]
        lines.append(
            f"{name:<{width}}" + "".join(f"  {cell:>{len(head)}}" for head, cell in zip(columns, cells, strict=True))
        )
    return "\n".join(lines)


def report_predictions(trainer, tokenizer, split, dataset, answers):
    """Write generated_predictions.txt (for `predict`), then score, save and print the metrics, and return them."""
    predictions = decode(tokenizer, answers.predictions)
    labels = decode(tokenizer, dataset["labels"])
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if split == "predict":  # on disk before anything can go wrong with the metrics
        places = dataset.select_columns([name for name in ("prompt", "dataset", "row") if name in dataset.column_names])
        lines = [
            json.dumps({"labels": label, "predict": prediction, **place}, ensure_ascii=False) + "\n"
            for label, prediction, place in zip(labels, predictions, places, strict=True)
        ]
        write_text(output_dir / ANSWERS_FILE, "".join(lines))
    if unlabelled := labels.count(""):
        trainer.say(f"{unlabelled} rows have no response to compare with; they are not scored.")
    trainer.say(f"Scoring {len(labels):,} answers …")
    scores = score_labelled(predictions, labels)
    runtime = {name: value for name, value in answers.metrics.items() if "preparation" not in name}
    metrics = {**runtime, **{f"{split}_{name}": value for name, value in scores.items()}}
    metrics |= {f"{split}_samples": len(dataset), **slow_because()}
    trainer.save_metrics(split, metrics)
    trainer.say(metric_table(metrics))
    if split == "predict":
        trainer.say(f"The answers are in {output_dir / ANSWERS_FILE}, one JSON object a line. The first two:")
        for prompt, label, prediction in list(zip(dataset["prompt"][:2], labels, predictions, strict=False)):
            trainer.say(describe_answer(prompt, label, prediction))
    return metrics


def describe_answer(prompt, label, prediction):
    """Three lines, each one line whatever the texts hold."""
    texts = {"prompt": prompt, "reference": label or "(none)", "answer": prediction or "(nothing)"}
    return "\n".join(f"  {name:<9}  {cut_short(' '.join(text.split()), 150)}" for name, text in texts.items())


def score_labelled(predictions, labels):
    """BLEU-4 and ROUGE over the rows that have a label; nothing without any."""
    labelled = [(prediction, label) for prediction, label in zip(predictions, labels, strict=True) if label]
    return score_all(*zip(*labelled, strict=True)) if labelled else {}


def dev_scores(trainer, tokenizer, dataset) -> dict[str, float]:
    """BLEU-4 and ROUGE of the answers to the dev rows, during training: the same in every process."""
    answers = trainer.predict(dataset, metric_key_prefix="eval").predictions
    scores = on_first_rank(lambda: score_labelled(decode(tokenizer, answers), decode(tokenizer, dataset["labels"])))
    return {f"eval_{name}": value for name, value in scores.items()}


def decode(tokenizer, rows):
    """Text of each row of token ids; -100 and other ids without text decode to nothing."""
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
