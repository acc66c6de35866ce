"""Teach a preference that can be measured, and put what it took into one table.

    python -m benchmarks.preference                              tiny and the sample, prefix and LoRA, float and int4
    python -m benchmarks.preference --model ../shared/chatglm2-mini --data ../shared/AdvertiseGen --methods lora \
        --bits 0 --length 32 --steps 300 --reward_steps 300 --rounds 40 --rates ppo=1e-3 --ppo_epochs 2
    python -m benchmarks.preference --only_write                 the rows alone: 500 pairs, 100 dev pairs

There are two preferences. --prefer colour: a pair is a row of ADGEN that asks for a colour, its chosen answer is the row's
own text, which names it, the rejected one the same text without the sentences that do. --prefer short: the chosen answer
is the first clause of the row's text, closed with a full stop, the rejected one its first three. Every line begins with a
model that was tuned on answers, of which one in five is as is preferred. `rate` is the share of sampled answers to the
dev prompts that name the colour that is asked for, or are one closed clause; `any` that of those that name any of the
pairs' colours: a model too small to copy the right one learns no more than this. `KL` is the mean over these answers of
log p(answer) - log p_reference(answer), in nats, `dev loss` that of answers that are held out, before and after. A step of
PPO answers --answers prompts. A stage that has ended is not run again: what was stopped goes on. Each stage is a run of
main.py; its peak memory is that of its process, its samples/s count rows, pairs or answered prompts in training alone.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "prefix": ["--finetuning_type", "p_tuning", "--pre_seq_len", "32"],
    "lora": ["--finetuning_type", "lora", "--lora_target", "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"],
}
RATES = {
    "prefix": {"sft": "2e-2", "rm": "2e-2", "dpo": "5e-3", "ppo": "2e-2"},
    "lora": {"sft": "3e-3", "rm": "3e-3", "dpo": "1e-3", "ppo": "3e-3"},
}
MAX_LENGTH = 64  # of a prompt, and of an answer without --length
PAIRS, DEV_PAIRS, ANSWERS = 500, 100, 3000
PREFERRED = 0.2  # of the answers that the model is tuned on before


# ---- rows


def colour_of(content):
    """The colour that a prompt of ADGEN asks for, or None."""
    found = re.search(r"颜色#([^*]+)", content)
    return found[1] if found else None


def clauses_of(text):
    return re.findall(r"[^。！；，]+[。！；，]?", text)


def colour_answers(row, length):
    """(chosen, rejected), or None; with `length` the colour is named in so many characters."""
    colour, text = colour_of(row["content"]), row["summary"]
    without = "".join(clause for clause in clauses_of(text) if colour is None or colour not in clause)
    return (text, without) if colour and colour in text[:length] and len(without) >= 10 else None


def short_answers(row, length):
    """(chosen, rejected), or None; with `length` of no more than so many characters."""
    clauses = clauses_of(row["summary"])
    chosen, rejected = ("".join(clauses[:number]).rstrip("。！；，") + "。" for number in (1, 3))
    return (chosen, rejected) if len(clauses) > 3 and len(rejected) <= (length or MAX_LENGTH) else None


PREFERENCES = {"colour": colour_answers, "short": short_answers}
SAMPLING = {"colour": [], "short": ["--top_p", 1, "--temperature", 1]}  # top_p 0.7 cuts off what one answer in five is


def make_pairs(file, prefer="colour", length=None):
    """The pairs that the rows of a file give."""
    pairs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if found := PREFERENCES[prefer](row, length):
            pairs.append({"prompt": row["content"], "history": [], "chosen": found[0], "rejected": found[1]})
    return pairs


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_rows(data, folder, prefer="colour", length=None):
    """Write train.json and dev.json of pairs/ and of answers/ into a folder, from a folder of ADGEN; see make_pairs."""
    rng = random.Random(0)
    train, dev = (make_pairs(data / f"{split}.json", prefer, length) for split in ("train", "dev"))
    rng.shuffle(train)
    dev = (dev + train[PAIRS:])[:DEV_PAIRS]  # the sample has fewer dev rows that give a pair
    held = {pair["prompt"] for pair in dev}
    train = [pair for pair in train if pair["prompt"] not in held]

    def answers(pairs):
        kinds = ("chosen" if rng.random() < PREFERRED else "rejected" for _ in pairs)
        return [
            {"prompt": pair["prompt"], "history": [], "response": pair[kind]}
            for pair, kind in zip(pairs, kinds, strict=True)
        ]

    for split, pairs in (("train", train), ("dev", dev)):
        write(folder / "pairs" / f"{split}.json", pairs[:PAIRS])
        write(folder / "answers" / f"{split}.json", answers(pairs[:ANSWERS]))


# ---- runs


def run_main(words):
    done = subprocess.run([sys.executable, ROOT / "ptuning/main.py", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def run_once(folder, words):
    """run_main of a training run in a folder, unless it has ended there with these words."""
    words, note = [str(word) for word in words], folder / "command.json"
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != words:
        run_main(words)
        note.write_text(json.dumps(words), encoding="utf-8")


def train(stage, method, bits, rows, folder, args, *more):
    """Train a stage; its results: peak memory, samples a second of training alone, last dev figures."""
    kind = "answers" if stage == "sft" else "pairs"
    steps = {"sft": args.steps, "rm": args.reward_steps, "dpo": args.pair_steps, "ppo": args.rounds}[stage]
    batch = args.answers if stage == "ppo" else args.batch
    evaluates = ("--eval_strategy", "steps", "--validation_file", rows / kind / "dev.json", "--eval_steps", steps)
    lengths = ("--max_source_length", MAX_LENGTH, "--max_target_length", args.length or MAX_LENGTH)
    run_once(
        folder,
        [
            *("--stage", stage, "--do_train", "--train_file", rows / kind / "train.json", "--prompt_column", "prompt"),
            *(() if stage == "ppo" else evaluates),
            *(("--response_column", "response") if stage == "sft" else ()),
            *("--model_name_or_path", args.model, "--output_dir", folder, "--overwrite_output_dir", *lengths),
            *("--per_device_train_batch_size", batch, "--max_steps", steps, "--save_steps", steps),
            *("--learning_rate", args.rates.get(stage, RATES[method][stage])),
            *("--logging_steps", 10, "--report_to", "none"),
            *("--disable_tqdm", "true", "--plot_loss", "false", *(("--quantization_bit", bits) if bits else ())),
            *METHODS[method],
            *more,
        ],
    )
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    results = json.loads((folder / "train_results.json").read_text())
    seconds = results["train_runtime"] - sum(entry.get("eval_runtime", 0) for entry in history)
    dev = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    speed = batch * steps / seconds
    return {"checkpoint": folder / f"checkpoint-{steps}", "gb": results["train_peak_memory_gb"], "speed": speed, **dev}


def sample(checkpoint, rows, folder, prefer):
    """(share of the sampled answers to the dev prompts that are as is preferred, share of `any`, these answers as rows)."""
    run_main(
        [
            *("--do_predict", "--test_file", rows / "answers/dev.json", "--ptuning_checkpoint", checkpoint),
            *("--output_dir", folder, "--disable_tqdm", "true", "--do_sample", "true", "--seed", 0),
            *SAMPLING[prefer],
        ]
    )
    prompts = [json.loads(line)["prompt"] for line in (rows / "answers/dev.json").read_text("utf-8").splitlines()]
    lines = (folder / "generated_predictions.txt").read_text("utf-8").splitlines()
    answers = [json.loads(line)["predict"] for line in lines]
    if prefer == "short":
        named = sum(bool(re.fullmatch("[^。！；，]+[。！；]", answer)) for answer in answers)
        named_any = named
    else:
        pairs = (rows / "pairs/train.json").read_text("utf-8").splitlines()
        colours = {colour_of(json.loads(line)["prompt"]) for line in pairs}
        named = sum(colour_of(prompt) in answer for prompt, answer in zip(prompts, answers, strict=True))
        named_any = sum(any(colour in answer for colour in colours) for answer in answers)
    return (
        named / len(prompts),
        named_any / len(prompts),
        [{"prompt": prompt, "response": answer} for prompt, answer in zip(prompts, answers, strict=True) if answer],
    )


def log_probs(checkpoint, files, length):
    """{name: (log-probabilities of the answers in a file, cut at `length` tokens, tokens)} with what a checkpoint holds."""
    import torch

    from alignment.dpo import answer_log_probs
    from checkpoint import load_model, load_tokenizer, read_config
    from data.batches import collate_training
    from data.encoding import encode_training
    from data.examples import load_examples
    from tuning.methods import prepare_model, read_settings

    settings = read_settings([checkpoint])
    shape = {name: settings.get(name) for name in ("pre_seq_len", "prefix_projection")}
    config = read_config(settings["base_model"], pre_seq_len=shape["pre_seq_len"])
    model = load_model(settings["base_model"], config=config, quantization_bit=settings.get("quantization_bit") or None)
    prepare_model(model, settings["finetuning_type"], settings["checkpoints"])
    tokenizer, found = load_tokenizer(settings["base_model"], config), {}
    for name, file in files.items():
        examples, _ = load_examples(file, "prompt", "response")
        encoded = encode_training(examples, tokenizer, max_source_length=MAX_LENGTH, max_target_length=length)
        sums = []
        for start in range(0, len(encoded), 20):
            rows = encoded.select(range(start, min(start + 20, len(encoded))))
            batch = collate_training(list(rows), pad_token_id=tokenizer.pad_token_id)
            with torch.no_grad():
                sums += answer_log_probs(model.eval(), batch["input_ids"], batch["labels"]).tolist()
        found[name] = sums, sum(label != -100 for labels in encoded["labels"] for label in labels)
    return found


def cost(policy, reference, sampled, rows, length):
    """(KL in nats an answer, dev loss of the reference, of the policy)."""
    write(sampled_file := rows / "sampled.json", sampled)
    files = {"sampled": sampled_file, "dev": rows / "answers/dev.json"}
    now, before = log_probs(policy, files, length), log_probs(reference, files, length)
    kl = sum(p - q for p, q in zip(now["sampled"][0], before["sampled"][0], strict=True)) / len(sampled)
    return kl, *(-sum(found["dev"][0]) / found["dev"][1] for found in (before, now))


# ---- the table

HEADER = "| method | weights | rm accuracy | stage | rate before | after | any before | after | KL | dev loss before | after |"
MEMORY = "| method | weights | stage | peak memory | beside sft | samples/s |"


def lines_of(method, bits, args, rows):
    """(the lines of figures, the lines of memory) of a way of tuning on float or integer weights."""
    folder = args.output_dir / f"{method}{bits or ''}"
    sft = train("sft", method, bits, rows, folder / "sft", args)
    begin = ["--ptuning_checkpoint", sft["checkpoint"]]
    rm = train("rm", method, bits, rows, folder / "rm", args, *begin)
    judge = ("--reward_model", rm["checkpoint"], "--ppo_epochs", args.ppo_epochs)
    ppo = train("ppo", method, bits, rows, folder / "ppo", args, *begin, *judge)
    dpo = train("dpo", method, bits, rows, folder / "dpo", args, *begin)
    cached = train("dpo", method, bits, rows, folder / "dpo-cache", args, *begin, "--dpo_cache")
    before, any_before, _ = sample(sft["checkpoint"], rows, folder / "sampled-before", args.prefer)
    name, figures = f"| {method} | {f'int{bits}' if bits else 'float'} |", []
    for stage, found in (("dpo", dpo), ("ppo", ppo)):
        after, any_after, answers = sample(found["checkpoint"], rows, folder / f"sampled-after-{stage}", args.prefer)
        kl, dev_before, dev_after = cost(
            found["checkpoint"], sft["checkpoint"], answers, rows, args.length or MAX_LENGTH
        )
        figures.append(
            f"{name} {rm['eval_accuracy']:.0%} | {stage} | {before:.0%} | {after:.0%} | {any_before:.0%} | "
            f"{any_after:.0%} | {kl:.2f} | {dev_before:.3f} | {dev_after:.3f} |"
        )
    stages = {"sft": sft, "rm": rm, "dpo": dpo, "dpo --dpo_cache": cached, "ppo": ppo}
    memory = [
        f"{name} {stage} | {found['gb']:.3f} GB | {found['gb'] / sft['gb']:.2f} | {found['speed']:.1f} |"
        for stage, found in stages.items()
    ]
    return figures, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "ptuning/tiny", help="base model: a folder")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "AdvertiseGen/sample", help="folder with train.json and dev.json of ADGEN"
    )
    parser.add_argument("--prefer", choices=list(PREFERENCES), default="colour")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output/preference")
    parser.add_argument("--steps", type=int, default=200, help="of tuning on answers")
    parser.add_argument("--pair_steps", type=int, default=120, help="of dpo")
    parser.add_argument("--reward_steps", type=int, default=120, help="of rm")
    parser.add_argument(
        "--length",
        type=int,
        help="take pairs that are as is preferred in so many characters, and cut answers at so many tokens [all, 64]",
    )
    parser.add_argument("--batch", type=int, default=16, help="rows, or pairs, of a step")
    parser.add_argument("--rounds", type=int, default=30, help="steps of ppo")
    parser.add_argument("--answers", type=int, default=32, help="of such a step")
    parser.add_argument("--rates", default="", help="learning rates in place of RATES: sft=1e-1,ppo=5e-2")
    parser.add_argument("--ppo_epochs", type=int, default=4, help="optimizer steps with the answers of such a step")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bits", default="0,4", help="0: float weights")
    parser.add_argument("--only_write", action="store_true")
    args = parser.parse_args()
    args.rates = dict(pair.split("=") for pair in args.rates.split(",") if pair)
    rows = args.output_dir
    write_rows(args.data, rows, args.prefer, args.length)
    if args.only_write:
        return
    sys.path.insert(0, str(ROOT / "ptuning"))
    print(f"{HEADER}\n|{'---|' * 11}", flush=True)
    memory = []
    for method in args.methods.split(","):
        for bits in map(int, args.bits.split(",")):
            lines, more = lines_of(method, bits, args, rows)
            memory += more
            print("\n".join(lines), flush=True)
    print("\n".join([f"\n{MEMORY}", f"|{'---|' * 6}", *memory]))


if __name__ == "__main__":
    main()
