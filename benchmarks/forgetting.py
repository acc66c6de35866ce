"""What tuning on adverts makes a model forget, and what keeps it: one table of runs of main.py.

    python -m benchmarks.forgetting                                    tiny and the sample, 200 and 400 steps
    python -m benchmarks.forgetting --lines untuned,official,keep --steps 400 --keep 1:0.5 0.5:0.5 0.8:1
    python -m benchmarks.forgetting --model ../shared/chatglm2-mini --data ../shared/AdvertiseGen --steps 100 \
        --general ptuning/forgetting/general.jsonl --general_dev none --lines official,keep

`dev loss` is that of the adverts' dev rows, `drift` and `same answers` are those of the held-out prompts of --general, and
`general BLEU-4` is that of greedy answers to the rows of --general_dev, which no run has seen. `mixing` learns 70%
adverts and 30% labelled general rows, in as many rows a step. `keep W:S` is --keep_base W --keep_base_rows S. `CPU s` is
the processor time of the run, loading and measuring included.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "AdvertiseGen/sample"
METHODS = {
    "p_tuning": ["--pre_seq_len", "32", "--learning_rate", "2e-2"],
    "lora": ["--finetuning_type", "lora", "--learning_rate", "1e-3"],
}
HEADER = "| training | steps | adverts dev loss | drift | same answers | general BLEU-4 | CPU s |"


def run_main(words):
    """Run main.py; its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, ROOT / "ptuning/main.py", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def general_bleu(args, folder, *trained):
    """BLEU-4 of greedy answers to the general dev rows, None where there are none."""
    if args.general_dev == "none":
        return None
    run_main(
        [
            *(
                "--do_predict",
                "--test_file",
                args.general_dev,
                "--prompt_column",
                "prompt",
                "--response_column",
                "response",
            ),
            *("--history_column", "history", "--output_dir", folder / "general", "--do_sample", "false"),
            *("--max_source_length", 128, "--max_target_length", 64, "--disable_tqdm", "true", *trained),
        ]
    )
    return json.loads((folder / "general/predict_results.json").read_text())["predict_bleu-4"]


def shown(value, form):
    return "" if value is None else form.format(value)


def line(name, steps, dev_loss, drift, same, bleu, seconds):
    cells = [shown(dev_loss, "{:.4f}"), shown(drift, "{:.3f}"), shown(same, "{:.0%}"), shown(bleu, "{:.2f}")]
    return f"| {name} | {steps or ''} | {' | '.join(cells)} | {shown(seconds, '{:.0f}')} |"


def untuned(args):
    return line("untuned", None, None, 0.0, 1.0, general_bleu(args, args.output_dir / "untuned", *args.base), None)


def tuned(args, name, steps, *more, rows=None):
    """The line of a run with further flags `more`; `rows` are the flags that say what it learns."""
    folder = args.output_dir / f"{args.method}-{name}-{steps}".replace(":", "-").replace(" ", "-")
    rows = rows or ("--train_file", args.data / "train.json")
    seconds = run_main(
        [
            *("--do_train", *rows, "--prompt_column", "content", "--response_column", "summary", *args.base),
            *("--validation_file", args.data / "dev.json", "--eval_strategy", "steps", "--eval_steps", steps),
            *("--max_eval_samples", 240, "--max_source_length", args.max_source_length, "--max_target_length", 64),
            *("--per_device_train_batch_size", args.batch, "--max_steps", steps, "--save_steps", steps),
            *("--logging_steps", 50, "--output_dir", folder, "--overwrite_output_dir", "--report_to", "none"),
            *("--disable_tqdm", "true", "--general_file", args.general, *METHODS[args.method], *more),
        ]
    )
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    dev = next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None)
    last = next(entry for entry in reversed(history) if "drift" in entry)
    bleu = general_bleu(args, folder, "--ptuning_checkpoint", folder / f"checkpoint-{steps}")
    return line(name, steps, dev, last["drift"], last["same_answers"], bleu, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "ptuning/tiny", help="base model: a folder or hub id")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder with train.json and dev.json of ADGEN")
    parser.add_argument("--general", default=SAMPLE / "general.json", help="rows of general prompts")
    parser.add_argument(
        "--general_dev", default=str(SAMPLE / "general_dev.json"), help="general rows to score, or none"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output/forgetting")
    parser.add_argument("--method", choices=METHODS, default="p_tuning")
    parser.add_argument("--quantization_bit", type=int, choices=(0, 4, 8), default=0)
    parser.add_argument("--steps", default="200,400")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max_source_length", type=int, default=128)
    parser.add_argument("--lines", default="untuned,official,mixing,keep")
    parser.add_argument("--keep", nargs="+", default=["0.8:1"], help="weight:share, of each line of keep")
    parser.add_argument(
        "--more", nargs="*", default=[], help="further flags of every run, without their --: name=value"
    )
    args = parser.parse_args()
    more = [word for pair in args.more for word in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])]
    args.base = ["--model_name_or_path", args.model]
    if args.quantization_bit:
        args.base += ["--quantization_bit", args.quantization_bit]
    print(f"{HEADER}\n|{'---|' * 7}", flush=True)
    wanted = args.lines.split(",")
    if "untuned" in wanted:
        print(untuned(args), flush=True)
    for steps in map(int, args.steps.split(",")):
        if "official" in wanted:
            print(tuned(args, "official recipe", steps, *more), flush=True)
        if "mixing" in wanted:
            both = ("--dataset", "adverts,general", "--dataset_dir", args.data, "--mix_ratios", "0.7,0.3")
            print(tuned(args, "mixing", steps, *more, rows=both), flush=True)
        for pair in args.keep if "keep" in wanted else ():
            weight, share = pair.split(":")
            keep = ("--keep_base", weight, "--keep_base_rows", share)
            print(tuned(args, f"keep {pair}", steps, *keep, *more), flush=True)


if __name__ == "__main__":
    main()
