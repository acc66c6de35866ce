"""What tuning cost in general ability: the scores of base and tuned model beside each other.

Answers to the official `evaluation/evaluate_ceval.py`, which knows the base model alone. Tasks are those of EleutherAI's
lm-evaluation-harness, which is installed apart: pip install "lm_eval>=0.4.13,<0.5".

    python ptuning/benchmark.py --ptuning_checkpoint output/my-run --tasks ceval-valid
    python ptuning/benchmark.py --ptuning_checkpoint output/my-run --official_ceval CEval
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

from arguments import add_trained_arguments, parse_words
from common.start import look_first, work
from first_look import look_at_model

ABSENT = 'lm-evaluation-harness is missing, which --tasks needs. Run: pip install "lm_eval>=0.4.13,<0.5"'


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.split("\n")[0])
    add_trained_arguments(parser)
    parser.add_argument("--quantization_bit", type=int, help="4 or 8. Read from the checkpoint, else float weights.")
    parser.add_argument("--tasks", help="Tasks of lm-evaluation-harness, with commas, such as ceval-valid.")
    parser.add_argument("--official_ceval", metavar="FOLDER", help="C-Eval by the official recipe: its folder CEval.")
    parser.add_argument("--num_fewshot", type=int, default=5, help="Solved questions before each, of --tasks [5].")
    parser.add_argument("--limit", type=int, help="Questions of each task, or of each file [all].")
    parser.add_argument("--include_path", metavar="FOLDER", help="Folder with more tasks, in the harness's own form.")
    parser.add_argument("--batch_size", type=int, help="Answers computed at once [what fits].")
    parser.add_argument("--output_dir", help="Folder for benchmark.json and benchmark.txt [only printed].")
    args = parse_words(parser, argv)
    if bool(args.tasks) == bool(args.official_ceval):
        raise ValueError("Give --tasks, such as --tasks ceval-valid, or --official_ceval FOLDER, and not both.")
    if not args.model_name_or_path and not args.ptuning_checkpoint:
        raise ValueError("--ptuning_checkpoint is missing: what was tuned, such as output/my-run.")
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(ABSENT)
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected at least {least}.")
    for name in ("official_ceval", "include_path"):
        folder = getattr(args, name)
        if folder and not Path(folder).is_dir():
            raise FileNotFoundError(f"--{name} {folder}: there is no such folder.")
    return args


if __name__ == "__main__":  # --help and mistakes are answered now: torch and transformers take seconds to load
    look_first(lambda argv: look_at_model(parse_arguments(argv)), sys.argv[1:])

from transformers.utils import logging

from checkpoint import choose_device, choose_dtype, load_model, load_tokenizer, resolve_folder
from checkpoints.ways import RULES
from common.files import write_json, write_text
from common.messages import dtype_name
from evaluation.ceval import read_subjects, score_subjects
from first_look import NO_BASE_OF
from training.memory import rows_that_fit
from training.progress import ShownProgress
from tuning.methods import find_trained
from tuning.session import check_base, open_base, resolve_session
from tuning.swapping import untouched

BASE, TUNED = "base", "tuned"


# ---- the models


def open_session(args):
    """The session of the flags, its base model's folder open. ValueError where nothing names one."""
    found, damaged = find_trained(args.ptuning_checkpoint)
    for problem in damaged:
        print(problem)
    session = resolve_session(vars(args), found[-1:] if found else found)
    if not session.base:
        raise ValueError(NO_BASE_OF.format(checkpoint=session.checkpoint))
    where = {"revision": args.model_revision, "cache_dir": args.cache_dir}
    open_base(session, **where, **session.prefix_shape)
    check_base(session)
    return session


def load(folder, session, config=None, device_map=None):
    """A base model in evaluation's dtype."""
    device = choose_device()
    dtype, reason = choose_dtype(device)
    bits = f"int{session.bits} and " if session.bits else ""
    print(f"Loading {folder} on {device}: {bits}{dtype_name(dtype)} ({reason}).", flush=True)
    # On a CPU the fast kernels for few rows round what they multiply to bfloat16: a score would depend on the batch.
    backend = "torch" if device == "cpu" else "auto"
    how = {"dtype": dtype, "device": device_map or device, "quantization_bit": session.quantization_bit}
    return load_model(folder, config=config, quantization_backend=backend, **how).requires_grad_(False)


def sides(session, device_map):
    """Yield ("base", model, text before its chat prompts), then ("tuned", …), where a checkpoint is given.

    One model in memory is both with a prefix or an adapter; where the weights were tuned, one is loaded after the other.
    """
    tuned_before = session.data_fields["source_prefix"]
    own = session.folder, session, session.config, device_map
    if session.checkpoint is None:
        yield BASE, load(*own), ""
    elif RULES[session.method.name].swaps:
        model = load(*own)
        session.do_train = True  # an adapter stays beside the weights
        print(session.prepare(model))
        model.requires_grad_(False).eval()
        with untouched(model):
            yield BASE, model, ""
        yield TUNED, model, tuned_before
    else:
        base = session.saved.get("base_model") if session.method.is_complete else session.base
        if base:
            yield BASE, load(resolve_folder(base), session, None, device_map), ""
        else:
            print(f"{session.checkpoint} does not say its base model: it is scored alone.")
        model = load(*own)
        session.prepare(model)
        yield TUNED, model.requires_grad_(False).eval(), tuned_before


# ---- the scores


def score_tasks(args, tokenizer):
    """A function that gives {(task, metric): value} of a model. ValueError for a task that is not there."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from evaluation.harness import HarnessModel

    wanted = [name.strip() for name in args.tasks.split(",") if name.strip()]
    # The harness's own thousands of tasks are looked through only where they are needed.
    for own_only in [True, False] if args.include_path else [False]:
        manager = TaskManager(include_path=args.include_path, include_defaults=not own_only)
        unknown = [name for name in wanted if not manager.match_tasks([name])]
        if not unknown:
            break
    if unknown or not wanted:
        raise ValueError(
            f"--tasks {args.tasks}: there is no task {', '.join(unknown)}. `lm_eval ls tasks` lists what there is; "
            "--include_path FOLDER adds tasks of your own."
        )

    def score(model, before):
        answers = HarnessModel(model, tokenizer, args.batch_size or rows_that_fit(model, model.config.seq_length // 2))
        found = simple_evaluate(
            model=answers,
            tasks=wanted,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
        return {
            (task, name.partition(",")[0]): value
            for task, metrics in {**found["results"], **found.get("groups", {})}.items()
            for name, value in metrics.items()
            if isinstance(value, int | float) and "," in name and "stderr" not in name and math.isfinite(value)
        }

    return score


def score_ceval(args, tokenizer):
    """A function that gives {(subject, "acc"): share} of a model by the official recipe."""
    subjects = {name: rows[: args.limit] for name, rows in read_subjects(args.official_ceval).items()}

    def score(model, before):
        tokenizer.source_prefix = before
        progress = ShownProgress(shown=True, bar=sys.stderr.isatty(), say=print)
        progress.begin("question", sum(map(len, subjects.values())))
        rows = args.batch_size or rows_that_fit(model, model.config.seq_length // 2)
        found = score_subjects(model, tokenizer, subjects, rows, progress.advance)
        progress.end()
        return {(name, "acc"): value for name, value in found.items()}

    return score


def table_of(scores):
    """Markdown: a line for each (task, metric), its score by each model, and the difference where there are two."""
    both = len(scores) > 1
    head = ["task", "metric", *scores, *(["difference"] if both else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for key in next(iter(scores.values())):
        values = [found[key] for found in scores.values()]
        cells = [f"{value:.4f}" for value in values] + ([f"{values[1] - values[0]:+.4f}"] if both else [])
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(lines)


def main(argv):
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    session = open_session(args)
    tokenizer = load_tokenizer(session.folder, session.config)
    score = (score_tasks if args.tasks else score_ceval)(args, tokenizer)
    scores = {}
    for name, model, before in sides(session, args.device_map):
        print(f"Scoring the {name} model …", flush=True)
        scores[name] = score(model, before)
        del model
    table = table_of(scores)
    print(f"\n{table}")
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "benchmark.txt", table + "\n")
        about = {"tasks": args.tasks, "official_ceval": args.official_ceval, "num_fewshot": args.num_fewshot}
        named = {name: {"/".join(key): value for key, value in found.items()} for name, found in scores.items()}
        checkpoint = str(session.checkpoint) if session.checkpoint else None
        write_json(
            folder / "benchmark.json",
            {**about, "base_model": session.base, "checkpoint": checkpoint, "scores": named},
        )
        print(f"This table and its figures are in {folder}.")


if __name__ == "__main__":
    work(main, sys.argv[1:])
