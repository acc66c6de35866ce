"""What a program can say before torch is loaded, which takes seconds: its mistakes that need none, and its plan.

Answers to nothing in the official scripts. Whatever is checked here is checked again where it is needed, with the same
words; hub ids and all that takes long to read are left to that place.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

from arguments import EXAMPLES
from checkpoints.file_names import REFERENCE_FILE, SIGNATURE_FILE, TENSORS_FILE, VALUE_HEAD_FILE
from checkpoints.run_folder import check_holds, find_checkpoints, names_in
from checkpoints.sidecar import finetuning_type, read_sidecar
from checkpoints.ways import DEFAULT_METHOD, RULES
from common.files import read_json
from common.processes import check_port
from data.examples import COLUMNS, look_at_file
from data.general import look_at_general
from data.preferences import look_at_pairs
from data.sources import FILES, source_of
from families import Family, check_flags_of, check_same_family, local_folder, read_base_settings
from training.stages import reads_pairs

NO_BASE = "--model_name_or_path is missing: the base model, such as THUDM/chatglm2-6b or ptuning/tiny."
NO_BASE_OF = "{checkpoint} does not say its base model; give --model_name_or_path."


def look_at_checkpoints(text: str | None) -> list[Path]:
    """The checkpoint folders that `--ptuning_checkpoint` means, one for each name. Raises as find_trained of methods.py."""
    folders = [find_checkpoints(name, verified=False)[0][-1] for name in (names_in(text) if text else ())]
    for folder in folders:
        if finetuning_type(folder) in (None, DEFAULT_METHOD):
            check_holds(folder, TENSORS_FILE)
    return folders


def look_at_checkpoint(text: str | None) -> Path | None:
    """The last of look_at_checkpoints(), or None."""
    return next(reversed(look_at_checkpoints(text)), None)


def look_at_reward_model(text: str) -> Path:
    """The checkpoint folder that `--reward_model` means. FileNotFoundError where it is none of a reward model."""
    if not Path(text).is_dir():
        raise FileNotFoundError(f"--reward_model {text}: there is no such folder. Train one with --stage rm.")
    return check_holds(find_checkpoints(text, verified=False)[0][-1], VALUE_HEAD_FILE, flag="--reward_model").parent


def look_at_base(
    name_or_path: str | None, checkpoint: Path | None, model_family: str | None = None, missing: str = NO_BASE
) -> str | None:
    """The base model that flag and checkpoint mean, None where this takes longer to know. Raises where it is none.

    `missing` is said where nothing names one.
    """
    kind = (finetuning_type(checkpoint) or DEFAULT_METHOD) if checkpoint else None
    if kind and kind != DEFAULT_METHOD and not RULES[kind].needs_base:
        return str(checkpoint)  # all weights of a model
    base = name_or_path or (checkpoint and read_sidecar(checkpoint).get("base_model"))
    if not base:
        raise ValueError(missing.format(checkpoint=checkpoint))
    if isinstance(base, str) and (folder := local_folder(base)):
        remembered = read_sidecar(checkpoint).get("model_family") if checkpoint else None
        settings, family = read_base_settings(folder, model_family, remembered)
        if checkpoint:
            check_same_family(checkpoint, base, family)
            check_same_shape(checkpoint, base, settings)
    return base


SHAPES = ("num_layers", "hidden_size", "kv_channels", "multi_query_group_num", "num_attention_heads")


def check_same_shape(checkpoint: Path, base: str, settings: dict) -> None:
    """ValueError where a checkpoint's own config.json has another shape than the base model's, by `settings`."""
    file = checkpoint / "config.json"
    own = read_json(file) if file.is_file() else {}
    differences = [name for name in SHAPES if name in own and own[name] != settings.get(name, own[name])]
    if differences:
        trained_on = read_sidecar(checkpoint).get("base_model") or "another base model"
        shapes = [", ".join(f"{name} {found.get(name)}" for name in differences) for found in (own, settings)]
        raise ValueError(
            f"{checkpoint} was trained on {trained_on} ({shapes[0]}). The base model here is {base} ({shapes[1]}). "
            "Give the model that it was trained on, or another checkpoint."
        )


def look_at_model(args) -> None:
    """Check the model that export_model.py is to write. FileNotFoundError and ValueError."""
    look_at_base(args.model_name_or_path, look_at_checkpoint(args.ptuning_checkpoint), args.model_family, NO_BASE_OF)


def look_at_demo(args) -> None:
    """Check the port and the model of a demo. FileNotFoundError and ValueError."""
    if "server_port" in args:
        check_port(args.server_name, args.server_port)
    checkpoints = look_at_checkpoints(args.ptuning_checkpoint)
    checkpoint = next(reversed(checkpoints), None)
    for folder in checkpoints:
        if read_sidecar(folder).get("stage") == "rm":
            raise ValueError(
                f"--ptuning_checkpoint {folder} is a reward model: it scores answers, and gives none. Its scores: "
                "python ptuning/main.py --stage rm --do_predict"
            )
    if args.pre_seq_len and not checkpoint:
        raise ValueError(f"--pre_seq_len {args.pre_seq_len} needs --ptuning_checkpoint, the prefix to answer with.")
    if args.auto:
        check_auto(checkpoints)
    look_at_base(args.model_name_or_path, checkpoint, args.model_family)


def check_auto(checkpoints: list) -> None:
    """ValueError and FileNotFoundError where --auto cannot choose among checkpoint folders and their base model."""
    if not checkpoints:
        raise ValueError("--auto needs --ptuning_checkpoint: it chooses between what was trained and the base model.")
    for checkpoint in checkpoints:
        kind = finetuning_type(checkpoint) or DEFAULT_METHOD
        if not RULES[kind].swaps:
            raise ValueError(
                f"--auto: {checkpoint} was trained with --finetuning_type {kind}, which changes the weights of the base "
                "model itself, so nothing is left to answer other prompts. Leave --auto out."
            )
        check_holds(checkpoint, SIGNATURE_FILE)


def look_at_run(model_args, data_args, given: dict, notes: list) -> None:
    """Check model, checkpoint and the first rows of a run of main.py, and print what it will do.

    The arguments are what parse_flags gives. FileNotFoundError and ValueError.
    """
    trains = given.get("do_train", False)
    resumes = trains and str(given.get("resume_from_checkpoint")).lower() not in ("none", "false")
    checkpoint = None if resumes else look_at_checkpoint(model_args.ptuning_checkpoint)
    stage = given.get("stage", "sft")
    if checkpoint and not trains and stage == "rm":
        check_holds(checkpoint, VALUE_HEAD_FILE, flag="--ptuning_checkpoint")
    elif checkpoint and not trains and stage != "sft":
        check_holds(checkpoint, REFERENCE_FILE, stage=stage)
    if given.get("reward_model"):
        look_at_reward_model(given["reward_model"])
    base = model_args.model_name_or_path
    if base or not resumes:
        missing = f"--model_name_or_path is missing (for ADGEN: {EXAMPLES['model_name_or_path']})."
        base = look_at_base(base, checkpoint, model_args.model_family, missing)
    if family := family_of_base(base, checkpoint, model_args.model_family):
        check_flags_of(family, data_args, SimpleNamespace(**given))
    if os.environ.get("RANK", "0") != "0":  # the first process reads the rows, and says what is wrong with them
        return
    roles = has_roles(data_args.prompt_template, checkpoint, family)
    files = look_at_data(data_args, given, trains, roles)
    plan = [f"Model: {base}."] if base else []
    plan += [f"Checkpoint: {checkpoint}."] if checkpoint else []
    counted = [f"{file}, {count:,} rows" if count else file for file, count in files.items()]
    plan += [f"Data: {'; '.join(counted)}."] if counted else []
    steps, epochs = given.get("max_steps", -1), given.get("num_train_epochs", 3.0)
    amount = (f", {steps:,} step{'s' * (steps > 1)}" if steps > 0 else f", {epochs:g} epochs") if trains else ""
    plan += [f"Run: {given['output_dir']}{amount}."] if not data_args.check_data else []
    with contextlib.suppress(OSError):  # a full disk or a closed pipe ends no run; main() says it
        print(f"{' '.join(plan)}\nLoading libraries …", flush=True)


def family_of_base(base: str | None, checkpoint: Path | None, model_family: str | None) -> Family | None:
    """The family of a base model, None where this takes longer to know."""
    saved = read_sidecar(checkpoint) if checkpoint else {}
    folder = local_folder(base) if isinstance(base, str) else None
    return read_base_settings(folder, model_family, saved.get("model_family"))[1] if folder else None


def has_roles(template: str | None, checkpoint: Path | None, family: Family | None) -> bool:
    """True where prompts are messages of roles, and where it takes longer to know."""
    saved = read_sidecar(checkpoint) if checkpoint else {}
    template = template or saved.get("prompt_template") or (family.template if family else None)
    return template in (None, "chatglm3")


def look_at_data(data_args, given: dict, trains: bool, keep_roles: bool) -> dict:
    """{file: number of rows, or None} of what a run reads, data sets left out. Raises as look_at_file."""
    columns = {name: getattr(data_args, f"{name}_column", None) for name in COLUMNS}
    found = {}
    for split, flag in FILES.items():
        wanted = given.get(f"do_{split}") or (split == "eval" and trains and given.get("eval_strategy", "no") != "no")
        if wanted and source_of(split, data_args, SimpleNamespace(do_train=trains)) == flag:
            file, stage = getattr(data_args, flag), given.get("stage", "sft")
            answers = split != "train" and not (split == "eval" and trains) and not data_args.check_data
            if reads_pairs(stage):
                found[file] = look_at_pairs(file, columns, single=split == "predict")
            else:
                unlabelled = answers or split == "predict" or stage == "ppo"
                found[file] = look_at_file(file, columns, unlabelled, keep_roles and stage == "sft")
    if trains and (file := given.get("general_file")):
        found[file] = look_at_general(file, data_args)
    return found
