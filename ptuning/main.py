"""P-Tuning v2 of ChatGLM2: train a prefix, evaluate it, predict with it.

Answers to the official `main.py`, section by section. Read a training step here, then in data.py,
modeling_chatglm.py and prefix_encoder.py.

    python ptuning/launch.py --nproc-per-node=8 ptuning/main.py --do_train … (see train.sh)
    python ptuning/main.py settings.json
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

from arguments import check_complete, parse_arguments, parse_flags
from chatglm2.bits import check_quantization_bit
from common.failure import catch_signals, end_with_launcher, leave, leave_on_signal, run
from tuning.rules import check_bits_train

if __name__ == "__main__":  # --help and mistakes are answered now: torch and transformers take seconds to load
    catch_signals(leave_on_signal)
    end_with_launcher()
    run(parse_flags, sys.argv[1:])

import torch
from transformers import set_seed
from transformers.utils import logging

from chatglm2.chat import TOP_K
from checkpoint import choose_dtype, generation_config, load_model, load_tokenizer, read_config, resolve_folder
from common.failure import going_on_without
from common.plots import plot_loss
from common.ranks import on_first_rank
from common.reports import close_reports, prepare_reports
from data.batches import collate_prediction, collate_training
from data.description import describe_training
from data.encoding import digest, encode_prediction, encode_training
from data.splits import check_data, check_fits, longest_example, read_split
from evaluation.prediction import dev_scores, predict, predict_with_each
from trainer import PrefixTrainer
from training.memory import count_weights, memory_table, needs_checkpointing, peak_memory_gb, rows_that_fit
from training.resume import describe_differences, find_resume_checkpoint, lock_run, release_run, training_record
from training.run_log import keep_printing
from training.schedule import describe_steps
from training.signals import describe_stop
from training.watch import describe_checkpoints
from tuning.freeze import check_layers
from tuning.lora import check_adapters, in_order
from tuning.methods import DEFAULTS, find_trained, load_trained, prepare_model, read_settings

# What a checkpoint's sidecar remembers, and what holds where neither a flag nor a sidecar says.
SIDECAR_FIELDS = {
    "prompt_column": None,
    "response_column": None,
    "history_column": None,
    "messages_column": None,
    "source_prefix": "",
    "max_source_length": 1024,
    "max_target_length": 128,
}


def main():
    # ------------------------------------------------------------------ 1. Arguments and seed
    model_args, data_args, training_args, notes = parse_arguments(sys.argv[1:])
    logging.set_verbosity_error()
    say = print if training_args.process_index == 0 else silent
    for note in notes:
        say(note)
    prepare_reports(training_args)
    trains = training_args.do_train and not data_args.check_data
    resume_from = prepare_run(model_args, training_args, say) if trains else None
    set_seed(training_args.seed)

    # ------------------------------------------------------------------ 2. What the checkpoint says
    found, damaged = find_trained(model_args.ptuning_checkpoint)
    for problem in damaged:
        say(f"{problem} It is passed over.")
    saved = read_settings(found)
    if len(found) > 1 and training_args.do_train and saved["finetuning_type"] == "p_tuning":
        raise ValueError(f"--ptuning_checkpoint {model_args.ptuning_checkpoint}: a run starts from one checkpoint.")
    model_args.ptuning_checkpoint = str(found[-1]) if found else None
    model_args.resume_lora_training |= bool(resume_from)
    apply_saved_settings(model_args, data_args, saved)
    if model_args.finetuning_type == "full" and saved and not resume_from:
        model_args.model_name_or_path = model_args.ptuning_checkpoint  # a complete model: needs nothing of its base
    check_complete(model_args, data_args, training_args)
    if resume_from:
        check_engine(resume_from, saved, training_args)
    method = model_args.finetuning_type
    checkpoints = saved.get("checkpoints", []) if method in ("p_tuning", "freeze", "lora") else []

    # ------------------------------------------------------------------ 3. Configuration and tokenizer
    folder = resolve_folder(
        model_args.model_name_or_path,
        model_args.model_revision,
        model_args.cache_dir,
        weights=not data_args.check_data,
    )
    config = read_config(
        folder,
        pre_seq_len=model_args.pre_seq_len,
        prefix_projection=bool(model_args.prefix_projection),
        prefix_dropout=model_args.prefix_dropout,
    )
    bits = check_quantization_bit(model_args.quantization_bit, config.quantization_bit)
    check_bits_train(method, bits, training_args.do_train)
    check_layers(model_args.num_layer_trainable, config.num_layers)
    check_adapters(checkpoints, bits, training_args.do_train, model_args.resume_lora_training)
    tokenizer = load_tokenizer(folder, config)

    # ------------------------------------------------------------------ 4. Data: file -> rows -> ids and labels
    if data_args.check_data:
        with training_args.main_process_first(desc="encoding"):
            return check_data(data_args, training_args, tokenizer, config.seq_length, say)
    train_data = eval_data = None
    read_rows_of = partial(read_split, data_args=data_args, training_args=training_args, tokenizer=tokenizer, say=say)
    with training_args.main_process_first(desc="encoding"):
        if training_args.do_train:
            train_data, rows_skipped = read_rows_of("train", encode=encode_training)
            if training_args.eval_strategy != "no":
                eval_data, _ = read_rows_of("eval", encode=encode_training)
            elif (data_args.validation_file or data_args.dev_ratio) and not training_args.do_eval:
                unread = "--validation_file is" if data_args.validation_file else "The rows of --dev_ratio are"
                say(f"{unread} not read: --eval_strategy steps gives a dev loss, --do_eval metrics.")
        dev_prompts = None
        if eval_data is not None and training_args.eval_with_generate:
            dev_prompts, _ = read_rows_of("eval", encode=encode_prediction)
        splits = [name for name in ("eval", "predict") if getattr(training_args, f"do_{name}")]
        prompts = {name: read_rows_of(name, encode=encode_prediction) for name in splits}
    for dataset in filter(None, (train_data, eval_data)):
        check_fits(dataset, config.seq_length, data_args)

    # ------------------------------------------------------------------ 5. Model: what is frozen, what trains
    dtype, reason = set_precision(training_args, method)
    official = training_args.precision == "official"
    full = "prefix" if official else "prefix, optimizer, loss and gradient norm"
    say(f"Weights: {str(dtype).removeprefix('torch.')} on {training_args.device} ({reason}); {full}: float32.")
    backend = model_args.quantization_backend
    if official and backend == "auto":  # the official kernels unpack to float16 and multiply in float16, as this one
        backend = "torch"
    started = time.monotonic()
    model = load_model(
        folder,
        config=config,
        dtype=dtype,
        device="cpu" if engine_of(training_args) else training_args.device,  # an engine gives each its part
        quantization_bit=model_args.quantization_bit,
        quantization_backend=backend,
    )
    say(f"Loaded {folder} in {time.monotonic() - started:.1f} s.")
    described = prepare_model(
        model,
        method,
        checkpoints,
        do_train=training_args.do_train,
        resume_lora_training=model_args.resume_lora_training,
        **{name: getattr(model_args, name) for name in DEFAULTS},
    )
    if resume_from and engine_of(training_args):
        load_trained(model, resume_from, method)  # before it is divided
    if (
        engine_of(training_args) and training_args.gradient_checkpointing is None
    ):  # the model is not where it will train
        on_gpu = training_args.device.type == "cuda"
        training_args.gradient_checkpointing = training_args.activation_checkpointing = on_gpu
    batch = largest_batch(model, train_data, data_args, training_args)
    if train_data is not None and training_args.gradient_checkpointing is None:
        batch["checkpointing"], decision = needs_checkpointing(model, **batch)
        training_args.gradient_checkpointing = training_args.activation_checkpointing = batch["checkpointing"]
        say(decision)
    say(memory_table(model, **batch))
    if described and not resume_from and (len(checkpoints) <= 1 or method == "lora"):
        say(described + (" A new run starts with it, at step 0." if checkpoints and training_args.do_train else ""))

    # ------------------------------------------------------------------ 6. Trainer
    if training_args.do_train:  # only now: what is refused leaves no folder behind
        on_first_rank(lock_run, training_args.output_dir)
    sampling = {"top_p": data_args.top_p, "top_k": TOP_K, "temperature": data_args.temperature}
    max_length = data_args.max_source_length + data_args.max_target_length + 1  # of prompt and answer together
    label_pad_id = -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    record = None
    if training_args.do_train:
        record = training_record(
            training_args, data_args.dataset or data_args.train_file, digest(train_data), model_args.quantization_bit
        )
    trainer = PrefixTrainer(
        model=model,
        args=training_args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        data_collator=partial(
            collate_training,
            pad_token_id=tokenizer.pad_token_id,
            label_pad_id=label_pad_id,
            **({"multiple_of": 1, "min_length": max_length} if official else {}),
        ),
        collate_prediction=partial(collate_prediction, pad_token_id=tokenizer.pad_token_id),
        generation_config=generation_config(
            tokenizer,
            config,
            max_length=min(training_args.generation_max_length or max_length, config.seq_length),
            num_beams=data_args.num_beams or training_args.generation_num_beams or 1,
            do_sample=data_args.do_sample,
            **(sampling if data_args.do_sample else {}),
        ),
        sidecar={
            "finetuning_type": method,
            **describe_method(model_args, checkpoints, bits, engine_of(training_args)),
            "base_model": model_args.model_name_or_path,
            "base_fingerprint": model.fingerprint,
            **{name: getattr(data_args, name) for name in SIDECAR_FIELDS},
            **({"training": record} if record else {}),
        },
        say=say,
    )

    if dev_prompts is not None:
        trainer.score_dev_rows = partial(dev_scores, trainer, tokenizer, dev_prompts)

    # ------------------------------------------------------------------ 7. Train
    if resume_from and (differences := describe_differences(saved.get("training") or {}, record)):
        say(differences)
    if resume_from and (reason := trainer.why_finished(resume_from)):
        say(reason)
    elif training_args.do_train:
        say(
            describe_training(
                train_data,
                tokenizer,
                skipped=rows_skipped,
                max_source_length=data_args.max_source_length,
                max_target_length=data_args.max_target_length,
            )
        )
        say(describe_steps(training_args, len(train_data)))
        say(describe_trainable(model))
        result = trainer.train(resume_from_checkpoint=resume_from)
        if trainer.state.global_step >= trainer.state.max_steps or not trainer.stop.agreed:
            result.metrics.update(count_trainable(model), train_samples=len(train_data))
            result.metrics["train_peak_memory_gb"] = round(peak_memory_gb(training_args.device), 3)
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
            trainer.save_state()
            if training_args.should_save and training_args.plot_loss:
                plot = Path(training_args.output_dir) / "training_loss.png"
                with going_on_without(plot, say):
                    plot_loss(trainer.state.log_history, plot)
            say(describe_checkpoints(trainer.state, training_args.output_dir))
        if trainer.stop.agreed:
            close_reports(trainer)
            leave(128 + trainer.stop.agreed, describe_stop(trainer.stop.agreed, trainer.state, training_args))
        release_run(training_args.output_dir)

    # ------------------------------------------------------------------ 8. Evaluate and predict
    for split, (dataset, rows_skipped) in prompts.items():
        say(f"{split}: {len(dataset)} rows, {rows_skipped} skipped (empty prompt).")
        if shortened := sum(turns > 0 for turns in dataset["dropped_turns"]):
            say(f"{shortened} of them lose their oldest turns at --max_source_length {data_args.max_source_length}.")
    datasets = {split: dataset for split, (dataset, _) in prompts.items()}
    if len(checkpoints) > 1 and method == "p_tuning":
        predict_with_each(checkpoints, trainer, tokenizer, datasets)
    else:
        predict(trainer, tokenizer, datasets)
    close_reports(trainer)


# ---------------------------------------------------------------------- what main() leaves to functions


def silent(*args):
    """What ranks other than 0 do instead of printing."""


def prepare_run(model_args, training_args, say):
    """The checkpoint folder to continue from, or None for a new run; refuses a folder that another run is using."""
    output_dir = training_args.output_dir
    if Path(output_dir).is_dir():  # one that is not there yet is made when there is something to put in it
        on_first_rank(lock_run, output_dir)
    wanted = training_args.resume_from_checkpoint
    resume_from, lines = on_first_rank(find_resume_checkpoint, wanted, output_dir, training_args.overwrite_output_dir)
    for line in lines:
        say(line)
    if resume_from:
        if model_args.ptuning_checkpoint:
            say(f"--ptuning_checkpoint {model_args.ptuning_checkpoint} is not read: the run has gone on from there.")
        model_args.ptuning_checkpoint = resume_from  # its settings hold, as those of any given prefix
        training_args.eval_on_start = False  # done when the run started
    return resume_from


def apply_saved_settings(model_args, data_args, saved):
    """Fill flags that were not given from the checkpoint, then from the defaults. ValueError on contradictions."""
    decided = ["finetuning_type", "pre_seq_len", "prefix_projection", *DEFAULTS]
    if not model_args.resume_lora_training:  # a new adapter need not be like the given ones
        decided = [name for name in decided if not name.startswith("lora_")]
    if model_args.finetuning_type == "none":
        decided, model_args.pre_seq_len, model_args.prefix_projection = [], None, None
    if model_args.lora_target:
        model_args.lora_target = in_order(model_args.lora_target.split(","))
    for name in decided:
        given = getattr(model_args, name)
        if name in saved and given is not None and given != saved[name]:
            raise ValueError(
                f"--{name} {given} contradicts {model_args.ptuning_checkpoint}, which was trained with "
                f"{saved[name]}. Leave the flag out: it is read from the checkpoint."
            )
        setattr(model_args, name, saved.get(name, given))
    model_args.finetuning_type = model_args.finetuning_type or "p_tuning"
    if model_args.quantization_bit is None:
        model_args.quantization_bit = saved.get("quantization_bit") or None
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = saved.get("base_model")
    if data_args.messages_column is None and (data_args.prompt_column or data_args.response_column):
        saved = {**saved, "messages_column": None}  # other rows than those it was trained on
    for name, default in SIDECAR_FIELDS.items():
        if getattr(data_args, name) is None:
            value = saved.get(name)
            setattr(data_args, name, default if value is None else value)
    if data_args.val_max_target_length is None:
        data_args.val_max_target_length = data_args.max_target_length


def engine_of(training_args):
    """What divides weights and optimizer over the processes: deepspeed, fsdp, or None."""
    return next((name for name in ("deepspeed", "fsdp") if getattr(training_args, name)), None)


def check_engine(resume_from, saved, training_args):
    """ValueError where a checkpoint's optimizer was divided in another way than this run would."""
    written, given = saved.get("engine"), engine_of(training_args)
    if written != given:
        raise ValueError(
            f"{resume_from} was written {f'with --{written}' if written else 'without an engine'}, and its optimizer "
            f"is continued the same way only. This run has {f'--{given}' if given else 'neither --deepspeed nor --fsdp'}."
        )


def describe_method(model_args, checkpoints, bits, engine):
    """What a checkpoint's sidecar remembers of the way of tuning; a prefix's is in its weights and config.json."""
    if model_args.finetuning_type == "freeze":
        names = ("num_layer_trainable", "name_module_trainable")
        return {name: getattr(model_args, name) or DEFAULTS[name] for name in names}
    if model_args.finetuning_type == "lora":
        merged = checkpoints[:-1] if model_args.resume_lora_training else checkpoints
        return {"quantization_bit": bits, "merged_checkpoints": [str(Path(folder).resolve()) for folder in merged]}
    return {"engine": engine} if engine else {}


def set_precision(training_args, method):
    """Dtype of the weights and why. Of the Trainer's own mixed precision loss scaling remains, and autocast where
    weights of the model itself train (in float32)."""
    fp16 = training_args.fp16 or training_args.fp16_full_eval
    bf16 = training_args.bf16 or training_args.bf16_full_eval
    official = training_args.precision == "official"
    dtype, reason = choose_dtype(training_args.device, fp16, bf16, official)
    if training_args.deepspeed:  # it keeps the float32 weights itself
        return dtype, f"{reason}; DeepSpeed trains float32 copies"
    training_args.fp16 = dtype == torch.float16 and training_args.do_train and not official
    training_args.bf16 = dtype == torch.bfloat16 and training_args.do_train and method in ("full", "freeze")
    training_args.mixed_precision = "fp16" if training_args.fp16 else "bf16" if training_args.bf16 else "no"
    training_args.fp16_full_eval = training_args.bf16_full_eval = False
    if method == "full" and training_args.do_train:
        return torch.float32, f"all of them train; products in {str(dtype).removeprefix('torch.')}"
    return dtype, reason


def largest_batch(model, train_data, data_args, training_args):
    """What memory_table must know of the largest batch of training or, without training, of prediction."""
    if train_data is not None:
        length = longest_example(train_data, data_args)
        rows = training_args.per_device_train_batch_size
        return {
            "batch_size": min(rows, len(train_data)) if training_args.world_size == 1 else rows,
            "length": -(-length // 8) * 8,  # as collate_training pads
            "num_supervised": min(length, data_args.max_target_length + 1),
            "checkpointing": bool(training_args.gradient_checkpointing),
        }
    length = data_args.max_source_length + data_args.max_target_length + 1
    if (data_args.num_beams or 1) > 1:
        batch_size = training_args.per_device_eval_batch_size * data_args.num_beams
    else:
        batch_size = training_args.prediction_batch_size or rows_that_fit(model, length)
    return {"batch_size": batch_size, "length": length, "num_supervised": 0}


def count_trainable(model):
    """{"trainable_parameters", "total_parameters"}: numbers that train, and all of them."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(numbers for numbers, _ in count_weights(model).values())
    return {"trainable_parameters": trainable, "total_parameters": total}


def describe_trainable(model):
    """The share of parameters that train, in one line."""
    trainable, total = count_trainable(model).values()
    return f"Trainable: {trainable:,} of {total:,} parameters ({trainable / total:.3%})."


if __name__ == "__main__":
    keep_printing()
    run(main)
    if torch.distributed.is_initialized():
        # Leave without tearing the process group down: the destructor of gloo's (torch 2.13) waits, holding the
        # interpreter, for a thread that may be waiting for the interpreter. All files are written by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
