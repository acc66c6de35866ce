"""Give a checkpoint that has none the signature of its training prompts, by which `auto` tells what is like them.

Answers to no official file. Training writes it into every checkpoint; those of 2023 and of earlier versions are without.
It reads the training rows as main.py does and takes main.py's flags; what the checkpoint says need not be said again.

    python ptuning/sign.py --ptuning_checkpoint output/old-run --train_file AdvertiseGen/train.json
"""

import sys

from arguments import check_complete, parse_arguments, parse_flags
from checkpoints.file_names import SIGNATURE_FILE
from checkpoints.run_folder import names_in
from checkpoints.sidecar import finetuning_type, read_sidecar
from checkpoints.ways import DEFAULT_METHOD, RULES, SWAPPED, has_signature
from common.start import look_first, work
from first_look import family_of_base, has_roles, look_at_base, look_at_checkpoint, look_at_data

NEEDED = ["--do_train", "--output_dir", "nowhere"]  # by main.py; nothing is trained, and no folder made


def check_unsigned(checkpoint):
    """ValueError for a checkpoint that needs no signature, or has one."""
    kind = finetuning_type(checkpoint) or DEFAULT_METHOD
    if not has_signature(kind, read_sidecar(checkpoint).get("stage")):
        raise ValueError(
            f"{checkpoint} needs no signature: auto chooses a base model or what answers beside it "
            f"({' or '.join(SWAPPED)}), and this is {'a reward model' if RULES[kind].swaps else kind}."
        )
    if (checkpoint / SIGNATURE_FILE).is_file():
        raise ValueError(f"{checkpoint} has a {SIGNATURE_FILE} already: --auto can choose it as it is.")


def look(argv):
    """Check the checkpoint, its base and its rows, before torch is loaded. FileNotFoundError and ValueError."""
    model_args, data_args, given, _ = parse_flags([*NEEDED, *argv])
    text = model_args.ptuning_checkpoint
    if not text or len(names_in(text)) > 1:
        raise ValueError(
            f"--ptuning_checkpoint {text}: expected one checkpoint or one run, such as output/my-run or output/my-run/all."
        )
    checkpoint = look_at_checkpoint(text)
    check_unsigned(checkpoint)
    base = look_at_base(model_args.model_name_or_path, checkpoint, model_args.model_family)
    family = family_of_base(base, checkpoint, model_args.model_family)
    look_at_data(data_args, given, True, has_roles(data_args.prompt_template, checkpoint, family))


if __name__ == "__main__":  # --help and mistakes are answered now: torch and transformers take seconds to load
    look_first(look, sys.argv[1:])

from transformers.utils import logging

from checkpoint import choose_device, choose_dtype, load_model
from data.encoding import encode_training
from data.splits import read_split
from tuning.session import open_run, session_of
from tuning.signature import FEWEST_PROMPTS, sign_prompts, write_signature


def main(argv):
    model_args, data_args, training_args, _ = parse_arguments([*NEEDED, *argv])
    logging.set_verbosity_error()
    session = session_of(model_args, data_args, print)
    for checkpoint in session.found:
        check_unsigned(checkpoint)
    check_complete(model_args, data_args, training_args)
    config, tokenizer = open_run(session, model_args, data_args, training_args, pre_seq_len=None)
    rows, _ = read_split("train", data_args, training_args, tokenizer, encode_training, print)
    if len(rows) < FEWEST_PROMPTS:
        raise ValueError(f"There are {len(rows)} training rows, and a signature needs at least {FEWEST_PROMPTS}.")
    device = choose_device()
    dtype, _ = choose_dtype(device)
    how = {"dtype": dtype, "device": device, "quantization_bit": session.quantization_bit}
    model = load_model(session.folder, config=config, **how).requires_grad_(False)
    if not session.method.beside_model:  # an adapter may stand on others, which are a part of its base
        session.do_train = True
        session.prepare(model)
    signature = sign_prompts(model.eval(), rows, tokenizer, session.sidecar(model.fingerprint))
    for checkpoint in session.found:
        write_signature(signature, checkpoint)
    print(f"Wrote {SIGNATURE_FILE} into {', '.join(map(str, session.found))}: --auto can choose it now.")


if __name__ == "__main__":
    work(main, sys.argv[1:])
