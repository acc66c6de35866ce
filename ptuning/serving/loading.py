"""The ChatServer that the flags of the page, the terminal and the API describe."""

import contextlib
import gc
from pathlib import Path

from checkpoint import choose_device, choose_dtype, load_model, load_tokenizer
from checkpoints.placing import describe_places
from checkpoints.prefix import warn_of_other_base
from checkpoints.run_folder import list_checkpoints, names_in
from common.flags import check_ranges
from common.messages import dtype_name
from common.processes import check_port
from first_look import NO_BASE, check_auto
from serving.auto import AUTO, AdapterGate
from serving.server import BASE, ChatServer
from tuning.methods import find_trained, method_of
from tuning.session import check_base, contradiction, open_base, resolve_session


def load_server(args, say=print):
    """The ChatServer that parsed flags describe; `say` is called with lines for the user."""
    check_ranges(args)
    found, damaged = find_trained(args.ptuning_checkpoint, prefixes=True)
    if args.auto:
        check_auto(found)
    several = len(found) > 1 and len(names_in(args.ptuning_checkpoint)) > 1 and method_of(found[0]).beside_model
    if several:  # the first one answers where no other is asked for
        found.reverse()
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
    keeps_base = checkpoint is None or method.beside_model  # the model in memory answers without what was trained, too
    folder, bits = session.folder, session.quantization_bit

    tokenizer = load_tokenizer(folder, config, prompt_template=session.data_fields["prompt_template"])
    device = choose_device()
    dtype, reason = choose_dtype(device, bf16=args.bf16)
    output_layer = " with the output layer in int8" if args.quantize_output_layer else ""
    precision = f"{f'int{bits} and ' if bits else ''}{dtype_name(dtype)}{output_layer}"
    say(f"Loading {session.base} on {device}: {precision} ({reason}).")
    model = load_model(
        folder,
        config=config,
        dtype=dtype,
        device=args.device_map or device,
        quantization_bit=bits,
        quantize_output_layer=args.quantize_output_layer,
    )
    if places := describe_places(model):
        say(places)
    model.requires_grad_(False)
    tuned, beside = None, names_of(found[::-1] if several else found[-1:])
    if not keeps_base:
        session.do_train = args.auto  # an adapter that trains stays beside the weights
        tuned = session.prepare(model.requires_grad_(False))
        beside = beside if args.auto else {}
    default = next(iter(beside), checkpoint and checkpoint.name)
    server = ChatServer(
        model.eval().requires_grad_(False),
        tokenizer,
        beside,
        default=default,
        base=BASE if beside or not checkpoint else checkpoint.name,
        source_prefix="" if beside else saved.get("source_prefix") or "",
        max_batch=args.concurrency,
        max_queue=args.max_queue,
        max_sessions=args.max_sessions,
    )
    server.sampling, server.given_source_prefix = args.sampling, args.source_prefix
    server.name = Path(session.base).name
    if method.is_complete and saved.get("base_model"):
        server.name = Path(saved["base_model"]).name
    if keeps_base and beside and not several and checkpoint.name in list_checkpoints(checkpoint.parent):
        server.run_folder = checkpoint.parent
    try:
        if beside and not keeps_base:
            server.gate = AdapterGate(model, args.concurrency)
        server.candidates = tuple(beside)
        for name in beside:
            warn_of_other_base(model, beside[name])
            length = server.prefix_length(name)
        if args.auto:
            server.usual = AUTO
            server.signatures()
    except (ValueError, OSError):
        server.close()
        raise
    if tuned:
        say(tuned)
    elif several:
        say(f"Prefixes: {', '.join(f'{name} from {folder}' for name, folder in beside.items())}.")
    elif checkpoint and method.is_complete:
        say(f"All weights from {checkpoint}.")
    elif checkpoint:
        say(f"Prefix of {length} tokens from {checkpoint}.")
    else:
        say("No --ptuning_checkpoint: the base model answers.")
    if args.auto:
        say(
            f"Each prompt decides who answers: {' or '.join(beside)} what its training prompts are like, {BASE} all else."
        )
    return server


def names_of(folders) -> dict:
    """{name: folder} of checkpoints, each with a name of its own: the run's, the folder's, or both.

    One alone is called as its folder. ValueError where one is given twice, or called as what is there already.
    """
    folders = [Path(folder).resolve() for folder in folders]
    kinds = [[folder.name for folder in folders], [folder.parent.name for folder in folders]]
    if len(folders) > 1 and all(name.startswith("checkpoint-") for name in kinds[0]):
        kinds.reverse()
    kinds.append([f"{folder.parent.name}-{folder.name}" for folder in folders])
    for names in kinds:
        if len(set(names)) == len(names) and (len(names) == 1 or not {AUTO, BASE} & set(names)):
            return dict(zip(names, folders, strict=True))
    raise ValueError(
        f"--ptuning_checkpoint {','.join(map(str, folders))}: these cannot be told apart by the names of their folders and "
        f"runs, which also may not be {BASE} or {AUTO}. Give each once, or rename a folder."
    )


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
