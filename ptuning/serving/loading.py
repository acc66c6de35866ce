"""The ChatServer that the flags of the page, the terminal and the API describe."""

import contextlib
import gc
from pathlib import Path

import torch

from checkpoint import choose_dtype, load_model, load_tokenizer
from checkpoints.run_folder import list_checkpoints
from common.flags import check_ranges
from common.messages import dtype_name
from common.processes import check_port
from first_look import NO_BASE
from serving.server import BASE, ChatServer
from tuning.methods import find_trained
from tuning.session import check_base, contradiction, open_base, resolve_session


def load_server(args, say=print):
    """The ChatServer that parsed flags describe; `say` is called with lines for the user."""
    check_ranges(args)
    found, damaged = find_trained(args.ptuning_checkpoint)
    checkpoint = Path(found[-1]) if found else None
    for note in args.notes:
        say(note)
    for problem in damaged:
        say(f"{problem} Using {checkpoint.name}.")
    if args.pre_seq_len and not checkpoint:
        raise ValueError(f"--pre_seq_len {args.pre_seq_len} needs --ptuning_checkpoint, the prefix to answer with.")
    session = resolve_session(vars(args), found)
    saved, method = session.saved, session.method
    if args.pre_seq_len and "pre_seq_len" not in saved:
        raise contradiction("pre_seq_len", args.pre_seq_len, "none", checkpoint)
    if not session.base:
        raise ValueError(NO_BASE)
    config = open_base(session, revision=args.model_revision, cache_dir=args.cache_dir, pre_seq_len=None)
    check_base(session)
    folder, bits = session.folder, session.quantization_bit

    tokenizer = load_tokenizer(folder, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, reason = choose_dtype(device)
    output_layer = " with the output layer in int8" if args.quantize_output_layer else ""
    precision = f"{f'int{bits} and ' if bits else ''}{dtype_name(dtype)}{output_layer}"
    say(f"Loading {session.base} on {device}: {precision} ({reason}).")
    model = load_model(
        folder,
        config=config,
        dtype=dtype,
        device=device,
        quantization_bit=bits,
        quantize_output_layer=args.quantize_output_layer,
    )
    model.requires_grad_(False)
    tuned = session.prepare(model) if checkpoint and not method.beside_model else None
    prefixes = {checkpoint.name: checkpoint} if checkpoint and method.beside_model else {}
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
    server.sampling, server.given_source_prefix = args.sampling, args.source_prefix
    server.name = Path(session.base).name
    if method.is_complete and saved.get("base_model"):
        server.name = Path(saved["base_model"]).name
    if prefixes and checkpoint.name in list_checkpoints(checkpoint.parent):
        server.run_folder = checkpoint.parent
    try:
        length = server.prefix_length(server.default)
    except ValueError:
        server.close()
        raise
    if tuned:
        say(tuned)
    elif checkpoint and method.is_complete:
        say(f"All weights from {checkpoint}.")
    elif checkpoint:
        say(f"Prefix of {length} tokens from {checkpoint}.")
    else:
        say("No --ptuning_checkpoint: the base model answers.")
    return server


@contextlib.contextmanager
def opened_server(args):
    """The ChatServer that parsed flags describe, for the address in them; it is closed in the end."""
    check_port(args.server_name, args.server_port)
    server = load_server(args)
    # The garbage collector passes over all that is in memory now and stays until the end. Else it looks at that again
    # and again while a request is read: 1 MB of JSON with 100,000 lists takes the event loop 0.19 s instead of 0.02.
    gc.freeze()
    try:
        yield server
    finally:
        server.close()
