"""P-Tuning v2 of ChatGLM2: train a prefix, evaluate it, predict with it.

Answers to the official `main.py`, section by section. One training step is in four files: this one puts together what
takes part in it, data/batches.py makes its tensors, chatglm2/modeling_chatglm.py computes its loss, and
chatglm2/prefix_encoder.py is what trains.

    python ptuning/launch.py --nproc-per-node=8 ptuning/main.py --do_train … (see train.sh)
    python ptuning/main.py settings.json
"""

import os
import sys
import time
from functools import partial

from arguments import check_complete, parse_arguments, parse_flags
from common.failure import end_with_launcher
from common.start import look_first, work
from first_look import look_at_run
from tuning.rules import engine_of

if __name__ == "__main__":  # --help and mistakes are answered now: torch and transformers take seconds to load
    end_with_launcher()
    look_first(lambda argv: look_at_run(*parse_flags(argv)), sys.argv[1:])

import torch
from transformers import set_seed
from transformers.utils import logging

import preference
from chatglm2.chat import TOP_K
from checkpoint import generation_config, load_model
from checkpoints.placing import describe_places
from common.messages import silent
from common.reports import close_reports, prepare_reports
from data.batches import collate_prediction, collate_training
from data.splits import check_data, check_fits, read_splits
from evaluation.prediction import describe_prompts, dev_scores, predict, predict_with_each
from forgetting.trainer import GeneralTrainer, open_general
from training.course import train_to_end
from training.memory import largest_batch, memory_table, settle_batch
from training.precision import choose_products, describe_precision, set_precision
from training.progress import say_above_bar
from training.resume import begin_run, prepare_run
from training.run_log import keep_printing
from training.stages import check_stage_of_run
from tuning.session import check_engine, open_run, session_of


def main():
    # ------------------------------------------------------------------ 1. Flags and seed
    model_args, data_args, training_args, notes = parse_arguments(sys.argv[1:])
    if training_args.stage != "sft":
        return preference.main(model_args, data_args, training_args, notes)
    logging.set_verbosity_error()
    say = say_above_bar if training_args.process_index == 0 else silent
    for note in notes:
        say(note)
    prepare_reports(training_args)
    trains, engine = training_args.do_train, engine_of(training_args)
    resume_from = prepare_run(model_args, training_args, say) if trains and not data_args.check_data else None
    set_seed(training_args.seed)

    # ------------------------------------------------------------------ 2. Session: what flags and checkpoint mean
    session = session_of(model_args, data_args, say, do_train=trains, resumes=bool(resume_from))
    check_complete(model_args, data_args, training_args)
    check_engine(session, engine)
    check_stage_of_run(session, training_args.stage)

    # ------------------------------------------------------------------ 3. Base model: configuration and tokenizer
    shape = {**session.prefix_shape, "prefix_dropout": model_args.prefix_dropout}
    config, tokenizer = open_run(session, model_args, data_args, training_args, **shape)

    # ------------------------------------------------------------------ 4. Data: file -> rows -> ids and labels
    phases = {"encoding": time.time()}
    with training_args.main_process_first(desc="encoding"):
        if data_args.check_data:
            return check_data(data_args, training_args, tokenizer, config.seq_length, say)
        data = read_splits(data_args, training_args, tokenizer, say)
        general = open_general(session, data_args, training_args, tokenizer, config.seq_length, say)
    for rows in filter(None, (data.train, data.dev)):
        check_fits(rows, config.seq_length, data_args)
    longest = sum(session.limits.values()) + 1  # tokens of prompt and answer together

    # ------------------------------------------------------------------ 5. Model: what is frozen, what trains
    dtype, reason = set_precision(training_args, session.method.name)
    say(describe_precision(dtype, reason, training_args))
    phases["loading"] = time.time()
    model = load_model(
        session.folder,
        config=config,
        dtype=dtype,
        device=model_args.device_map or ("cpu" if engine else training_args.device),  # an engine gives each its part
        quantization_bit=session.quantization_bit,
        quantization_backend=choose_products(training_args, model_args.quantization_backend),
        quantize_output_layer=model_args.quantize_output_layer,
    )
    say(f"Loaded {session.folder} in {time.time() - phases['loading']:.1f} s. {describe_places(model)}".rstrip())
    described = session.prepare(model)
    if resume_from and engine:
        session.method.load(model, resume_from)  # before it is divided
    batch = largest_batch(model, data.train, data_args, training_args)
    settle_batch(model, batch, training_args, say)
    say(memory_table(model, **batch))
    if described and not resume_from and not session.takes_turns:
        say(described + (" A new run starts with it, at step 0." if session.checkpoints and trains else ""))

    # ------------------------------------------------------------------ 6. Trainer
    # Only now: what is refused leaves no folder behind.
    record = begin_run(training_args, data_args, data, session.quantization_bit, say) if trains else None
    generation = answer_settings(data_args, training_args, longest, config.seq_length)
    trainer = GeneralTrainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.dev,
        processing_class=tokenizer,
        **collators(data_args, training_args, tokenizer, longest),
        generation_config=generation_config(tokenizer, config, **generation),
        sidecar=session.sidecar(model.fingerprint, engine=engine, training=record),
        general=general,
        say=say,
    )
    trainer.run_log.phases = phases
    if data.dev_prompts is not None:
        trainer.score_dev_rows = partial(dev_scores, trainer, tokenizer, data.dev_prompts)

    # ------------------------------------------------------------------ 7. Train
    if trains:
        train_to_end(trainer, model, data, data_args, session, record, resume_from, trainer.show_forgetting)

    # ------------------------------------------------------------------ 8. Evaluate and predict
    for split, (rows, skipped) in data.prompts.items():
        say(describe_prompts(split, rows, skipped, data_args.max_source_length))
    prompts = {split: rows for split, (rows, _) in data.prompts.items()}
    if session.takes_turns:
        predict_with_each(session.checkpoints, trainer, tokenizer, prompts)
    else:
        predict(trainer, tokenizer, prompts)
    trainer.run_log.end_training()
    close_reports(trainer)


# ---------------------------------------------------------------------- what main() leaves to functions


def collators(data_args, training_args, tokenizer, longest):
    """What makes batches of rows, as arguments of a trainer; `longest` tokens has a row of the official recipe."""
    padding = {"pad_token_id": tokenizer.pad_token_id}
    labels = {"label_pad_id": -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id}
    if training_args.precision == "official":
        labels |= {"multiple_of": 1, "min_length": longest}
    return {
        "data_collator": partial(collate_training, **padding, **labels),
        "collate_prediction": partial(collate_prediction, **padding),
    }


def answer_settings(data_args, training_args, longest, most):
    """How answers are found; prompt and answer have `longest` tokens together unless a flag says otherwise."""
    settings = {
        "max_length": min(training_args.generation_max_length or longest, most),
        "num_beams": data_args.num_beams or training_args.generation_num_beams or 1,
        "do_sample": data_args.do_sample,
    }
    if data_args.do_sample:
        settings |= {"top_p": data_args.top_p, "top_k": TOP_K, "temperature": data_args.temperature}
    return settings


if __name__ == "__main__":
    keep_printing()
    work(main)
    if torch.distributed.is_initialized():
        # Leave without tearing the process group down: the destructor of gloo's (torch 2.13) waits, holding the
        # interpreter, for a thread that may be waiting for the interpreter. All files are written by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
