"""The ChatServer that the flags of the page, the terminal and the API describe."""

from pathlib import Path

import torch

from chatglm2.bits import check_quantization_bit
from checkpoint import choose_dtype, load_model, load_tokenizer, read_config, resolve_folder
from checkpoints.run_folder import list_checkpoints
from common.flags import check_ranges
from serving.server import BASE, ChatServer
from tuning.lora import check_adapters
from tuning.methods import find_trained, prepare_model, read_settings
from tuning.rules import check_bits_train

# ---- the loader


def load_server(args, say=print):
    """The ChatServer that parsed flags describe; `say` is called with lines for the user.

    Raises ValueError and FileNotFoundError as the functions of checkpoint.py do.
    """
    check_ranges(args)
    found, damaged = find_trained(args.ptuning_checkpoint)
    checkpoint = Path(found[-1]) if found else None
    for problem in damaged:
        say(f"{problem} Using {checkpoint.name}.")
    saved = read_settings(found)
    method = saved.get("finetuning_type")
    if args.pre_seq_len and not checkpoint:
        raise ValueError(f"--pre_seq_len {args.pre_seq_len} needs --ptuning_checkpoint, the prefix to answer with.")
    if args.pre_seq_len not in (None, saved.get("pre_seq_len")):
        raise ValueError(
            f"--pre_seq_len {args.pre_seq_len} contradicts {checkpoint}, which was trained with "
            f"{saved.get('pre_seq_len', 'none')}. Leave the flag out: it is read from the checkpoint."
        )
    name = str(checkpoint) if method == "full" else args.model_name_or_path or saved.get("base_model")
    if not name:
        raise ValueError("--model_name_or_path is missing: the base model, such as THUDM/chatglm2-6b or ptuning/tiny.")
    bits = saved.get("quantization_bit") or None if args.quantization_bit is None else args.quantization_bit

    folder = resolve_folder(name)
    config = read_config(folder, pre_seq_len=None)
    num_bits = check_quantization_bit(bits, config.quantization_bit)
    if method != "p_tuning":
        check_bits_train(method, num_bits, do_train=False)
        check_adapters(saved.get("checkpoints", []), num_bits)
    tokenizer = load_tokenizer(folder, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, reason = choose_dtype(device)
    say(
        f"Loading {name} on {device}: {f'int{bits} and ' if bits else ''}{str(dtype).removeprefix('torch.')} ({reason})."
    )
    model = load_model(folder, config=config, dtype=dtype, device=device, quantization_bit=bits)
    model.requires_grad_(False)
    tuned = prepare_model(model, method, **saved) if method in ("freeze", "lora") else None
    prefixes = {checkpoint.name: checkpoint} if method == "p_tuning" else {}
    server = ChatServer(
        model,
        tokenizer,
        prefixes,
        default=checkpoint.name if checkpoint else None,
        base=checkpoint.name if checkpoint and not prefixes else BASE,
        source_prefix="" if prefixes else saved.get("source_prefix") or "",
        max_batch=args.concurrency,
        max_queue=args.max_queue,
        max_sessions=args.max_sessions,
    )
    server.name = Path(saved.get("base_model") or name).name if method == "full" else Path(name).name
    if prefixes and checkpoint.name in list_checkpoints(checkpoint.parent):
        server.run_folder = checkpoint.parent
    try:
        length = server.prefix_length(server.default)
    except ValueError:
        server.close()
        raise
    if tuned:
        say(tuned)
    elif method == "full":
        say(f"All weights from {checkpoint}.")
    elif checkpoint:
        say(f"Prefix of {length} tokens from {checkpoint}.")
    else:
        say("No --ptuning_checkpoint: the base model answers.")
    return server
