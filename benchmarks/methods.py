"""Tune one model in every way on the same rows for the same number of steps, and put the results into one table.

    python -m benchmarks.methods                     chatglm2-mini and ADGEN beside the checkout, 300 steps of 8 rows
    python -m benchmarks.methods --steps 4 --dev_rows 8 --methods lora

Every line is a run of main.py (train, then greedy answers to dev rows), one after the other. The learning rates were
chosen by short trials, see LEARNING_RATES; the rest are defaults. `samples/s` is training alone, without the dev loss;
`peak memory` is the training program's. The base model's dev loss is that of the LoRA run before its first step, where
an adapter changes nothing yet.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
METHODS = {
    "p_tuning": ["--pre_seq_len", "128"],
    "freeze": ["--finetuning_type", "freeze", "--num_layer_trainable", "3"],
    "lora": ["--finetuning_type", "lora"],
    "full": ["--finetuning_type", "full"],
}
LEARNING_RATES = {"p_tuning": "2e-2", "freeze": "1e-3", "lora": "1e-2", "full": "1e-3"}
SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def run_main(words):
    done = subprocess.run(
        [sys.executable, ROOT / "ptuning" / "main.py", *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def train(method, folder, args):
    """Train and return the log: dev losses by step, seconds of training alone, peak memory, trained share."""
    run_main(
        [
            *("--do_train", "--train_file", args.data / "train.json", "--validation_file", args.data / "dev.json"),
            *("--prompt_column", "content", "--response_column", "summary", "--model_name_or_path", args.model),
            *("--output_dir", folder, "--overwrite_output_dir", "--max_source_length", 64, "--max_target_length", 64),
            *("--max_train_samples", args.rows, "--max_eval_samples", args.dev_rows, "--eval_strategy", "steps"),
            *("--eval_steps", args.steps, "--eval_on_start", str(method == "lora").lower(), "--logging_steps", 10),
            *("--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 16, "--max_steps", args.steps),
            *("--save_steps", args.steps, "--learning_rate", args.learning_rate or LEARNING_RATES[method]),
            *("--report_to", "none", "--disable_tqdm", "true", *METHODS[method]),
        ]
    )
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    results = json.loads((folder / "train_results.json").read_text())
    seconds = results["train_runtime"] - sum(entry.get("eval_runtime", 0) for entry in history)
    return {
        "dev_losses": {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
        "samples_per_second": 8 * args.steps / seconds,
        "peak_memory_gb": results["train_peak_memory_gb"],
        "share": results["trainable_parameters"] / results["total_parameters"],
    }


def score(folder, args, checkpoint, *words):
    """{name: greedy score in percent} on the dev rows."""
    run_main(
        [
            *("--do_predict", "--test_file", args.data / "dev.json", "--max_predict_samples", args.dev_rows),
            *("--checkpoint_dir", checkpoint, "--output_dir", folder, "--do_sample", "false"),
            *("--per_device_eval_batch_size", 32, "--disable_tqdm", "true", *words),
        ]
    )
    results = json.loads((folder / "predict_results.json").read_text())
    return {name: results[f"predict_{name}"] for name in SCORES}


def line(name, share, loss, scores, memory="", speed="", rate=""):
    cells = [name, share, rate, f"{loss:.3f}", *(f"{scores[key]:.2f}" for key in SCORES), memory, speed]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "chatglm2-mini", help="base model: a folder")
    parser.add_argument(
        "--data", type=Path, default=SHARED / "AdvertiseGen", help="folder with train.json and dev.json"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "methods")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=5000, help="first training rows")
    parser.add_argument("--dev_rows", type=int, default=128, help="first dev rows, for the dev loss and the scores")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, with commas; with lora also none")
    parser.add_argument("--learning_rate", help="instead of those in LEARNING_RATES")
    args = parser.parse_args()
    started = time.monotonic()
    print(f"{args.steps} steps of 8 rows, {args.rows:,} rows of {args.data.name}, {args.model.name}\n")
    print(
        "| method | trained | learning rate | dev loss | BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L | peak memory | samples/s |"
    )
    print(f"|{'---|' * 10}", flush=True)
    for method in args.methods.split(","):
        folder = args.output_dir / method
        log = train(method, folder, args)
        checkpoint = folder / f"checkpoint-{args.steps}"
        if method == "lora":
            base = score(args.output_dir / "none", args, checkpoint, "--finetuning_type", "none")
            line("none", "0", log["dev_losses"][0], base)
        line(
            method,
            f"{log['share']:.2%}",
            log["dev_losses"][args.steps],
            score(folder, args, checkpoint),
            f"{log['peak_memory_gb']:.2f} GB",
            f"{log['samples_per_second']:.1f}",
            args.learning_rate or LEARNING_RATES[method],
        )
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
