"""What a run leaves behind when its training is over: metrics, state and plot; and what of a model has trained."""

import json
from pathlib import Path

from common.failure import going_on_without
from common.files import RESULTS_FILE, STATE_FILE, read_json, write_text
from common.plots import plot_loss
from common.quoting import as_typed
from common.script_words import next_commands
from common.slowness import slow_because
from data.held_out import words_for_held_out
from training.memory import count_weights, peak_memory_gb
from training.run_log import DRIFT_FIGURES
from training.watch import describe_checkpoints

PLOT_FILE = "training_loss.png"  # in a run's folder


def count_trainable(model) -> dict[str, int]:
    """{"trainable_parameters", "total_parameters"}: numbers that train, and all of them."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(numbers for numbers, _ in count_weights(model).values())
    return {"trainable_parameters": trainable, "total_parameters": total}


def describe_trainable(model) -> str:
    """The share of parameters that train, in one line."""
    trainable, total = count_trainable(model).values()
    return f"Trainable: {trainable:,} of {total:,} parameters ({trainable / total:.3%})."


def write_training_results(trainer, model, metrics: dict, num_rows: int):
    """Complete and show the metrics of training on `num_rows` rows; write them, trainer_state.json and the plot."""
    args = trainer.args
    metrics.update(count_trainable(model), train_samples=num_rows, **slow_because())
    metrics.update(last_drift(trainer.state.log_history))
    metrics["train_peak_memory_gb"] = round(peak_memory_gb(args.device), 3)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if args.should_save and args.plot_loss:
        plot = Path(args.output_dir) / PLOT_FILE
        trainer.say(f"Drawing {PLOT_FILE} …")
        with going_on_without(plot, trainer.say):
            plot_loss(trainer.state.log_history, plot)


def last_drift(log_history: list[dict]) -> dict[str, float]:
    """The figures of what is forgotten that a run has logged last; {} of a run that measures none."""
    logged = [entry for entry in log_history if "drift" in entry]
    return {name: logged[-1][name] for name in DRIFT_FIGURES} if logged else {}


def describe_drift(log_history: list[dict]) -> str:
    """One line on what is forgotten, in words; empty for a run that measures nothing."""
    if not (figures := last_drift(log_history)):
        return ""
    return (
        f"Forgetting: drift {figures['drift']:.3f}. On general prompts the tuned model finds each token of its base's own "
        f"answers less likely by so many nats (0: nothing has changed); {figures['same_answers']:.0%} of its answers are "
        "still the base's, word for word."
    )


def write_missing_results(trainer, model, checkpoint: str, num_rows: int):
    """Write the results of a run that was killed behind `checkpoint`, its last one; nothing where they are there."""
    if not (Path(trainer.args.output_dir) / STATE_FILE).is_file():
        write_training_results(trainer, model, trainer.end_from(checkpoint), num_rows)


def write_metrics(folder: Path, split: str, metrics: dict, combined: bool, say):
    """Write <split>_results.json and, with `combined`, all_results.json, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{split}_results.json": {}}
    if combined:
        try:
            files[RESULTS_FILE] = read_json(folder / RESULTS_FILE) if (folder / RESULTS_FILE).exists() else {}
        except ValueError as error:
            say(f"{error} It is written anew.")
            files[RESULTS_FILE] = {}
    for name, before in files.items():
        write_text(folder / name, json.dumps(before | metrics, indent=4, sort_keys=True))


def describe_end(state, args, dev_file: str | None) -> str:
    """Where the result of training is, and the commands to paste next; five lines at most."""
    folder = args.output_dir
    scores = getattr(args, "stage", "sft") == "rm"  # a reward model gives no answers
    commands = {} if scores else next_commands(folder)
    if not commands:
        rows = " ".join(map(as_typed, words_for_held_out(folder) or ["--test_file", str(dev_file or "FILE")]))
        trained, out = f"--ptuning_checkpoint {as_typed(folder)}", f"--output_dir {as_typed(folder)}"
        commands = {
            "evaluate": f"python ptuning/main.py{' --stage rm' * scores} --do_predict {rows} {trained} {out}",
            "talk": f"python ptuning/web_demo.py {trained}",
        }
    plot = Path(folder) / PLOT_FILE
    lines = [
        describe_checkpoints(state, folder),
        f"Picture of the losses: {plot}" if args.plot_loss and plot.is_file() else "",
        describe_drift(state.log_history),
        f"Evaluate it: {commands['evaluate']}",
        "" if scores else f"Talk to it: {commands['talk']}",
    ]
    return "\n".join(filter(None, lines)) if lines[0] else ""
