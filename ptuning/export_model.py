"""Write a model as a folder of its own: what was tuned merged, re-sharded, in int4 or int8; or a prefix, ready to use.

Answers to no official file. What comes out is in the official layout: weights under their official names, config.json,
tokenizer; it loads as MODEL here, and in the official code. LoRA adapters are added to the weights, those that freeze
or full have trained replace them. A prefix is no weight of the model: it stands in front of
every layer's keys and values, so no folder of weights can contain it. It is written as those keys and values instead
(projection computed, dropout gone), in the form of an official checkpoint, with the name of its base model and a
program of ten lines that loads both.

    python ptuning/export_model.py --model_name_or_path THUDM/chatglm2-6b --quantization_bit 4 --output_dir chatglm2-6b-int4
    python ptuning/export_model.py --ptuning_checkpoint output/my-lora --output_dir chatglm2-6b-tuned
    python ptuning/export_model.py --ptuning_checkpoint output/my-run/checkpoint-3000 --output_dir my-prefix
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from arguments import add_trained_arguments, parse_words
from chatglm2.bits import check_quantization_bit
from common.failure import catch_signals
from common.start import look_first, work
from first_look import NO_BASE_OF, look_at_model


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="export_model.py", description=__doc__.split("\n")[0])
    add_trained_arguments(parser)
    parser.add_argument("--output_dir", help="New folder for the result.")
    parser.add_argument("--quantization_bit", type=int, help="4 or 8: write integer weights. [as they are]")
    parser.add_argument("--max_shard_size", default="2GB", help="Largest weight file: a number and KB, MB or GB. [2GB]")
    parser.add_argument(
        "--format", choices=("safetensors", "bin"), default="safetensors", help="Of the weight files. [safetensors]"
    )
    args = parse_words(parser, argv, accepts_all=True)
    if not args.output_dir:
        raise ValueError("--output_dir is missing: the new folder for the result.")
    if Path(args.output_dir).exists() and (not Path(args.output_dir).is_dir() or any(Path(args.output_dir).iterdir())):
        raise ValueError(f"--output_dir {args.output_dir} exists already and is not empty. Give a new folder.")
    if not args.model_name_or_path and not args.ptuning_checkpoint:
        raise ValueError("--model_name_or_path is missing: the model to write, such as THUDM/chatglm2-6b.")
    return args


if __name__ == "__main__":  # --help and mistakes are answered now: torch and transformers take seconds to load
    look_first(lambda argv: look_at_model(parse_arguments(argv)), sys.argv[1:])

import torch
from transformers.utils import logging

from chatglm2.prefix_encoder import PrefixEncoder
from checkpoint import load_model, load_prefix, load_tokenizer, read_config, save_model, save_prefix
from checkpoints.placing import places_of
from checkpoints.run_folder import publish_checkpoint, stage_checkpoint
from checkpoints.sidecar import read_sidecar
from checkpoints.weight_files import stored_dtype
from common.messages import dtype_name
from tuning.methods import find_trained
from tuning.session import open_base, resolve_session

PROBE = "请写一段话，介绍一把蓝色的雨伞。"  # the logits of its prompt are compared
LOADER = """# Loads this prefix onto its base model and answers. In the project's folder: PYTHONPATH=ptuning python {folder}/load.py
import torch
from checkpoint import choose_dtype, load_model, load_prefix, load_tokenizer, read_config, resolve_folder

base = resolve_folder({base!r})
config = read_config(base, {family!r}, pre_seq_len={pre_seq_len})
tokenizer = load_tokenizer(base, config, source_prefix={source_prefix!r}, prompt_template={template!r})
device = "cuda" if torch.cuda.is_available() else "cpu"
model = load_model(base, config=config, dtype=choose_dtype(device)[0], device=device, quantization_bit={bits})
load_prefix(model, {folder!r})
print(model.chat(tokenizer, {probe!r}, max_length=256, do_sample=False)[0])
"""


def main(argv):
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    found, damaged = find_trained(args.ptuning_checkpoint)
    for line in (*args.notes, *damaged):
        print(line)
    # --quantization_bit is about what is written: the session has the bits that the checkpoint was trained on
    given = {name: getattr(args, name) for name in ("model_name_or_path", "model_family", "finetuning_type")}
    session = resolve_session(given, found)
    if not found or not session.method.beside_model:
        return export_weights(args, session)
    if len(found) > 1:
        raise ValueError(f"--ptuning_checkpoint {args.ptuning_checkpoint}: one prefix is written at a time. Give one.")
    export_prefix(args, session)


def open_source(args, session, **overrides):
    """Open the base model that a session means. ValueError where nothing says which."""
    if not session.base:
        raise ValueError(NO_BASE_OF.format(checkpoint=session.checkpoint))
    open_base(session, revision=args.model_revision, cache_dir=args.cache_dir, **overrides)
    return session.folder, session.config


@contextlib.contextmanager
def new_folder(folder):
    """A hidden folder to write into, which becomes `folder` when all is well, and goes when it is not."""
    staging = stage_checkpoint(folder)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging)
        raise
    publish_checkpoint(staging, folder)


@torch.inference_mode()
def probe(model, tokenizer):
    """Logits (S, V) of a fixed prompt, float32 on the CPU."""
    input_ids = torch.tensor([tokenizer.encode_prompt(PROBE)], device=model.device)
    return model(input_ids, use_cache=False).logits[0].float().cpu()


def compare(before, after, what):
    """Say that two sets of logits agree; ValueError if they do not."""
    difference = (before - after).abs().max().item()
    if not difference <= 1e-6 * before.abs().max().item():
        raise ValueError(
            f"{what} gives other logits than the model it was made from (largest difference {difference:g}), so it was "
            "not kept. The disk or the memory may be faulty; try again."
        )
    print(f"Read again: {before.shape[0]} x {before.shape[1]} logits, largest difference {difference:g}.")


# ---- a folder of weights


def export_weights(args, session):
    """Write the weights of a model in the official layout, what was tuned merged; read them again, and compare."""
    source, config = open_source(args, session, pre_seq_len=None)
    tokenizer = load_tokenizer(source, config)
    bits = check_quantization_bit(args.quantization_bit, config.quantization_bit)
    dtype = stored_dtype(source)
    output_dir = Path(args.output_dir)
    print(
        f"Reading {source}: {f'int{config.quantization_bit} and ' if config.quantization_bit else ''}{dtype_name(dtype)}."
    )
    with contextlib.ExitStack() as stack:
        model = merge(session, dtype, tokenizer, args.device_map or "cpu") if session.checkpoints else None
        if model and bits:  # quantized as it is read: through float files
            output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=".export-", dir=output_dir.absolute().parent)
            source = Path(stack.enter_context(folder))
            save_model(model, source)
            model = None
        if model is None:
            config = read_config(source, config.model_family, pre_seq_len=None)
            how = {
                "quantization_bit": args.quantization_bit,
                "quantization_backend": "torch",
                "device": args.device_map or "cpu",
            }
            model = load_model(source, config=config, dtype=dtype, **how)
        before = probe(model, tokenizer)
        with new_folder(output_dir) as staging:
            files = save_model(model, staging, max_shard_size=args.max_shard_size, file_format=args.format)
            places = places_of(model)
            del model
            written = load_model(staging, dtype=dtype, quantization_backend="torch", device=places)
            compare(before, probe(written, load_tokenizer(staging, written.config)), output_dir)
    size = sum((output_dir / file).stat().st_size for file in files) / 1e6
    print(
        f"Wrote {output_dir}: {size:,.1f} MB of weights in {len(files)} file{'s' if len(files) > 1 else ''}, "
        f"{f'int{bits} and ' if bits else ''}{dtype_name(dtype)}."
    )
    if source_prefix := session.saved.get("source_prefix"):
        print(f"It was trained with --source_prefix {shlex.quote(source_prefix)}: give that flag with it, too.")
    if not (output_dir / "modeling_chatglm.py").is_file():
        print(
            "It loads here as it is. The official code also needs its own .py files in it, which were not in the source."
        )


def merge(session, dtype, tokenizer, device):
    """The float model of a session's base with what its checkpoints hold in its weights."""
    folder, config = session.folder, session.config
    if config.quantization_bit:
        raise ValueError(
            f"{folder} holds int{config.quantization_bit} weights, into which nothing can be merged. Give the folder of "
            "the float model as --model_name_or_path; --quantization_bit makes the result integer again."
        )
    model = load_model(folder, config=config, dtype=dtype, device=device)
    print(session.method.merge(model, session.checkpoints, session.own_settings, partial(probe, tokenizer=tokenizer)))
    if session.quantization_bit:
        print(
            f"It was trained on int{session.quantization_bit} weights; here it is merged into the float ones, which "
            "differ a little."
        )
    return model


# ---- a prefix


def export_prefix(args, session):
    """Write the keys and values of a trained prefix as a checkpoint without projection; read it again and compare."""
    if args.quantization_bit or args.format == "bin":
        raise ValueError(
            "A prefix is always written as pytorch_model.bin in float32, apart from the base model. To quantize the "
            "base model, export it without --ptuning_checkpoint."
        )
    checkpoint, base, bits = session.checkpoint, session.base, session.quantization_bit
    source, config = open_source(args, session, **session.prefix_shape)
    tokenizer = load_tokenizer(source, config)
    how = {"quantization_bit": bits, "quantization_backend": "torch", "device": args.device_map or "cpu"}
    model = load_model(source, config=config, **how)
    load_prefix(model, checkpoint)
    before = probe(model, tokenizer)
    model.transformer.prefix_encoder = computed_prefix(model.transformer.prefix_encoder, config)
    config.prefix_projection = False
    output_dir = Path(args.output_dir)
    with new_folder(output_dir) as staging:
        sidecar = {**read_sidecar(checkpoint), "base_model": base, "base_fingerprint": model.fingerprint}
        save_prefix(model, staging, sidecar)
        tokenizer.save_pretrained(staging)
        facts = {"base": base, "folder": str(output_dir), "pre_seq_len": config.pre_seq_len, "bits": bits}
        facts["source_prefix"], facts["template"] = (
            session.data_fields[name] for name in ("source_prefix", "prompt_template")
        )
        facts["family"] = session.model_family
        (staging / "load.py").write_text(LOADER.format(**facts, probe=PROBE), encoding="utf-8")
        model.transformer.prefix_encoder.embedding.weight.data.zero_()
        load_prefix(model, staging)
        compare(before, probe(model, tokenizer), output_dir)
    shape = (config.pre_seq_len, config.num_layers, 2, config.num_key_value_heads, config.kv_channels)
    print(
        f"Wrote {output_dir}: the keys and values of {shape[0]} virtual tokens, float32, (tokens, layers, key and value, "
        f"groups, channels) = {shape}.\n"
        f"A prefix cannot be merged into weights: give {base} as the model and this folder as --ptuning_checkpoint, "
        "or run load.py in it."
    )


@torch.no_grad()
def computed_prefix(prefix_encoder, config):
    """A PrefixEncoder without projection that yields the same keys and values."""
    without = PrefixEncoder(type(config)(**{**config.to_dict(), "prefix_projection": False})).eval()
    weight = prefix_encoder.embedding.weight
    without.embedding.weight.copy_(weight if prefix_encoder.trans is None else prefix_encoder.trans(weight))
    return without


if __name__ == "__main__":
    catch_signals(signal.default_int_handler)  # an exception, so that what is half written goes
    work(main, sys.argv[1:])
