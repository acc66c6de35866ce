"""What tuning on adverts makes a model forget, and what keeps it: one table of runs of main.py.

    PYTHONPATH=ptuning python -m benchmarks.forgetting                 tiny and the sample, 200 and 400 steps
    PYTHONPATH=ptuning python -m benchmarks.forgetting --lines official,others --steps 200
    PYTHONPATH=ptuning python -m benchmarks.forgetting --lines official,keep --steps 400 --keep 1:0.5 0.5:0.5 0.8:1
    PYTHONPATH=ptuning python -m benchmarks.forgetting --model ../shared/chatglm2-mini --data ../shared/AdvertiseGen \
        --general ptuning/forgetting/general.jsonl --general_dev none --steps 100 --lines official,keep

`dev loss` is that of the adverts' dev rows; adverts BLEU-4 is that of greedy answers to the same rows. `general BLEU-4` is
that of greedy answers to the rows of --general_dev, which no run has seen: all, those without a list of attributes and those
with one, as the adverts' prompts have. `drift` and `same answers` are those of the held-out prompts of --general. `mixing`
learns 70% adverts and 30% labelled general rows, in as many rows a step. `keep W:S` is --keep_base W --keep_base_rows S.
`auto` gives a line more for `official` and each `keep`: every prompt decides whether that run's prefix or the base answers.
`others` are the runs of OTHERS. `CPU s` is the processor time of a run, loading and measuring included.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.auto import SAMPLE, bleu, ended_answers, forgotten_by_auto, lists_attributes, open_server, rows_of

from serving.auto import AUTO

ROOT = Path(__file__).resolve().parents[1]
MAIN = [ROOT / "ptuning/main.py"]
OTHER_PREFIXES = ["-m", "benchmarks.other_prefixes"]
METHODS = {
    "p_tuning": ["--pre_seq_len", "32", "--learning_rate", "2e-2"],
    "lora": ["--finetuning_type", "lora", "--learning_rate", "1e-3"],
}
OTHERS = {
    "learning rate 5e-3": ["--learning_rate", "5e-3"],
    "learning rate 5e-3, warm-up": ["--learning_rate", "5e-3", "--warmup_ratio", "0.1"],
    "learning rate 2e-2, warm-up": ["--warmup_ratio", "0.1"],
    "prefix of 8 tokens": ["--pre_seq_len", "8"],
    "prefix in the later half of the layers": ["--first_layer", "half"],
    "prefix in the last layer": ["--first_layer", "last"],
    "norm penalty 1e-4": ["--norm_penalty", "1e-4"],
    "norm penalty 1e-3": ["--norm_penalty", "1e-3"],
    "prefix dropout 0.3": ["--prefix_dropout", "0.3"],
}
HEADER = (
    "| training | steps | adverts dev loss | adverts BLEU-4 | general BLEU-4 | without a list | with one | drift | "
    "same answers | CPU s |"
)


def run(words, program=MAIN):
    """Run main.py, or main.py changed; its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *program, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def scored(adverts, adverts_rows, general, general_rows):
    """The four cells of BLEU-4, of answers (texts) to rows."""
    cells = [bleu(adverts, adverts_rows)]
    for kind in (None, False, True):
        places = [place for place, row in enumerate(general_rows) if kind in (None, lists_attributes(row))]
        cells.append(bleu([general[place] for place in places], [general_rows[place] for place in places]))
    return cells


def predicted(args, folder, file, columns, limit, *trained, program=MAIN):
    """The greedy answers to the first rows of a file."""
    lengths = ["--max_source_length", args.max_source_length, "--max_target_length", 64]
    columns = [word for name, column in columns.items() for word in (f"--{name}_column", column)]
    words = ["--do_predict", "--test_file", file, "--max_predict_samples", limit, *columns, *lengths]
    run([*words, "--output_dir", folder, "--do_sample", "false", "--disable_tqdm", "true", *trained], program)
    lines = (folder / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["predict"] for line in lines]


def scores_of(args, folder, *trained, program=MAIN):
    """The cells of scored() for what flags say, by main.py."""
    columns = {"prompt": "content", "response": "summary"}
    answers = predicted(
        args, folder / "adverts", args.data / "dev.json", columns, args.dev_rows, *trained, program=program
    )
    general = []
    if args.general_rows:
        columns = {"prompt": "prompt", "response": "response", "history": "history"}
        many = len(args.general_rows)
        general = predicted(args, folder / "general", args.general_dev, columns, many, *trained, program=program)
    return scored(answers, args.advert_rows, general, args.general_rows)


def shown(value, form):
    return "" if value is None else form.format(value)


def show(name, steps=None, dev_loss=None, scores=(), drift=None, same=None, seconds=None):
    """Print a line of the table."""
    forms = ["{:.4f}", *["{:.2f}"] * 4, "{:.3f}", "{:.0%}", "{:.0f}"]
    cells = map(shown, (dev_loss, *scores, drift, same, seconds), forms)
    print(f"| {name} | {steps or ''} | {' | '.join(cells)} |", flush=True)


def tuned(args, name, steps, *more, rows=None, program=MAIN):
    """Show the line of a run with further flags `more`, and give its checkpoint; `rows` are the flags that say what it
    learns."""
    folder = args.output_dir / f"{args.method}-{name}-{steps}".replace(":", "-").replace(" ", "-").replace(",", "")
    rows = rows or ("--train_file", args.data / "train.json")
    seconds = run(
        [
            *("--do_train", *rows, "--prompt_column", "content", "--response_column", "summary", *args.base),
            *("--validation_file", args.data / "dev.json", "--eval_strategy", "steps", "--eval_steps", steps),
            *("--max_eval_samples", args.dev_rows, "--max_source_length", args.max_source_length),
            *("--max_target_length", 64, "--per_device_train_batch_size", args.batch, "--max_steps", steps),
            *("--save_steps", steps, "--logging_steps", 50, "--output_dir", folder, "--overwrite_output_dir"),
            *("--report_to", "none", "--disable_tqdm", "true", "--general_file", args.general),
            *METHODS[args.method],
            *more,
        ],
        program,
    )
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    dev = next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None)
    last = next(entry for entry in reversed(history) if "drift" in entry)
    checkpoint = folder / f"checkpoint-{steps}"
    own = more[: 2 * (program is OTHER_PREFIXES)]  # what the prefix is, to whoever answers with it
    scores = scores_of(args, folder, "--ptuning_checkpoint", checkpoint, *own, program=program)
    show(name, steps, dev, scores, last["drift"], last["same_answers"], seconds)
    return checkpoint


def decided(args, name, steps, checkpoint):
    """Show the line of a run's prefix or adapter where every prompt decides who answers."""
    server = open_server(checkpoint)
    answers = [ended_answers(server, rows, AUTO) for rows in (args.advert_rows, args.general_rows)]
    server.close()
    del server  # and its model, before the next one is read
    gc.collect()
    adverts, general = ([answer.text for answer in found] for found in answers)
    forgotten = forgotten_by_auto(args, checkpoint)
    scores = scored(adverts, args.advert_rows, general, args.general_rows)
    show(f"{name} + auto", steps, None, scores, forgotten["drift"], forgotten["same_answers"])


def flags_of_other(args, flags):
    """Flags of OTHERS for the model's own number of layers."""
    layers = json.loads((Path(args.model) / "config.json").read_text())["num_layers"]
    return [{"half": layers // 2, "last": layers - 1}.get(word, word) for word in flags]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "ptuning/tiny", help="base model: a folder or hub id")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder with train.json and dev.json of ADGEN")
    parser.add_argument("--dev_rows", type=int, default=240)
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
    parser.add_argument("--lines", default="untuned,official,mixing,keep,auto")
    parser.add_argument("--keep", nargs="+", default=["0.8:1"], help="weight:share, of each line of keep")
    parser.add_argument("--others", nargs="*", help="which of OTHERS, by their names; all by default")
    parser.add_argument(
        "--more", nargs="*", default=[], help="further flags of every run, without their --: name=value"
    )
    args = parser.parse_args()
    more = [word for pair in args.more for word in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])]
    args.base = ["--model_name_or_path", args.model]
    if args.quantization_bit:
        args.base += ["--quantization_bit", args.quantization_bit]
    args.advert_rows = rows_of(args.data / "dev.json")[: args.dev_rows]
    args.general_rows = [] if args.general_dev == "none" else rows_of(args.general_dev)
    print(f"{HEADER}\n|{'---|' * 10}", flush=True)
    wanted = args.lines.split(",")
    if "untuned" in wanted:
        show("untuned", scores=scores_of(args, args.output_dir / "untuned", *args.base), drift=0.0, same=1.0)
    for steps in map(int, args.steps.split(",")):
        lines = []  # (name, flags, whether auto may choose it, what it learns)
        if "official" in wanted:
            lines.append(("official recipe", (), True, None))
        if "mixing" in wanted:
            both = ("--dataset", "adverts,general", "--dataset_dir", args.data, "--mix_ratios", "0.7,0.3")
            lines.append(("mixing", (), False, both))
        for pair in args.keep if "keep" in wanted else ():
            weight, share = pair.split(":")
            lines.append((f"keep {pair}", ("--keep_base", weight, "--keep_base_rows", share), True, None))
        for name, flags, chosen, rows in lines:
            checkpoint = tuned(args, name, steps, *flags, *more, rows=rows)
            if chosen and "auto" in wanted:
                decided(args, name, steps, checkpoint)
        for name, flags in OTHERS.items() if "others" in wanted else ():
            if args.others is None or name in args.others:
                own = flags[0] in ("--first_layer", "--norm_penalty")
                program = OTHER_PREFIXES if own else MAIN
                tuned(args, name, steps, *flags_of_other(args, flags), *more, program=program)


if __name__ == "__main__":
    main()
