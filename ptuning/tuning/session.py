"""What flags, checkpoints and a base model's folder mean together: decided here, once, for every program.

Answers to the lines of the official `main.py` that read a configuration and set pre_seq_len and quantization_bit in
it. Two steps, because a mistake in the flags is told before a model is looked for:

    session = resolve_session(given, found)    flags that were given, and what the checkpoints say; of a run: session_of
    open_base(session); check_base(session)    the folder of the base model, its configuration and bits; of a run: open_run

The rules: a flag that was given counts, then the checkpoint, then the default. A flag that contradicts what the
checkpoint has trained, or how its prompts were written, is an error. A complete checkpoint is its own base. Several prefixes take turns, several
adapters are laid one on the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from chatglm2.bits import check_quantization_bit
from chatglm2.configuration_chatglm import ChatGLMConfig
from checkpoint import family_of, load_tokenizer, read_config, resolve_folder
from checkpoints.ways import EFFICIENT_TUNING, METHOD_FLAGS, default_method
from families import check_flags_of, check_same_family, check_template
from tuning.method import Method
from tuning.methods import METHODS, find_trained, read_settings

# What a checkpoint's sidecar remembers of the data, and what holds where neither a flag nor a sidecar says.
DATA_FIELDS = {
    "prompt_column": None,
    "response_column": None,
    "history_column": None,
    "messages_column": None,
    "prompt_template": None,  # the family's own, once the base is open
    "query_separator": "\n",
    "train_on_history": False,
    "source_prefix": "",
    "max_source_length": 1024,
    "max_target_length": 128,
}


@dataclass
class Session:
    """What holds for one run or one server. Nothing in it is a tensor."""

    method: Method
    base: str | None  # folder or hub id of the base model
    quantization_bit: int | None  # 4 or 8 where a flag or the checkpoint asks for it; see `bits`
    settings: dict  # {flag of any method: value, or None where nothing decides it}
    data_fields: dict  # {name in DATA_FIELDS: value}
    found: list  # checkpoint folders that were given
    checkpoints: list  # folders to load onto the base, one after the other
    saved: dict  # all that the last checkpoint says of itself
    do_train: bool = False
    resumes: bool = False  # a run goes on from the checkpoint
    resume_adapter: bool = True  # train the given adapter on, not a new one on top of it
    decided_by: dict = field(default_factory=dict)  # {flag: "flag", "checkpoint" or "default"}
    # open_base and check_base fill in:
    folder: Path | None = None
    config: ChatGLMConfig | None = None
    model_family: str | None = None  # the flag; then the name of the one it is
    bits: int | None = None  # of the weights that will be used, the folder's own included

    @property
    def checkpoint(self) -> Path | None:
        """The last of the checkpoint folders that were given."""
        return self.found[-1] if self.found else None

    @property
    def own_settings(self) -> dict:
        """{flag of the method: value}, complete."""
        return self.method.complete(self.settings)

    @property
    def takes_turns(self) -> bool:
        """True for several checkpoints that are evaluated one by one."""
        return self.method.beside_model and len(self.checkpoints) > 1

    @property
    def prefix_shape(self) -> dict:
        """What read_config needs of a prefix; its length is None without one."""
        shape = {"pre_seq_len": self.settings["pre_seq_len"]}
        return {**shape, "prefix_projection": bool(self.settings["prefix_projection"])}

    @property
    def limits(self) -> dict:
        """{"max_source_length", "max_target_length"}: tokens of a prompt and of an answer."""
        return {name: self.data_fields[name] for name in ("max_source_length", "max_target_length")}

    def fill_flags(self, model_args, data_args):
        """Write what holds into the flags, for everything that reads them."""
        model_args.finetuning_type = self.method.name
        model_args.model_name_or_path = self.base
        model_args.quantization_bit = self.quantization_bit
        model_args.ptuning_checkpoint = str(self.checkpoint) if self.checkpoint else None
        for name, value in self.settings.items():
            setattr(model_args, name, value)
        for name, value in self.data_fields.items():
            setattr(data_args, name, value)
        if data_args.val_max_target_length is None:
            data_args.val_max_target_length = data_args.max_target_length

    def prepare(self, model) -> str | None:
        """Load the checkpoints onto the base model and set what trains; a line on what the model is now, or None."""
        how = {"do_train": self.do_train, "resume": self.resume_adapter}
        return self.method.prepare(model, self.checkpoints, self.own_settings, **how)

    def sidecar(self, fingerprint: str, *, engine: str | None = None, training: dict | None = None) -> dict:
        """What a checkpoint of this run remembers, beside its weights and config.json."""
        own = self.method.remember(self.own_settings, self.checkpoints, self.bits, resume=self.resume_adapter)
        return {
            "finetuning_type": self.method.name,
            **own,
            **({"engine": engine} if engine else {}),
            "base_model": self.base,
            "model_family": self.model_family,
            "base_fingerprint": fingerprint,
            **self.data_fields,
            **({"training": training} if training else {}),
        }


def remembered(saved, flags) -> dict:
    """{flag: value or None} of what a checkpoint says, and a flag may say otherwise."""
    told = {name: saved.get(name) for name in DATA_FIELDS}
    if flags.get("messages_column") is None and (flags.get("prompt_column") or flags.get("response_column")):
        told["messages_column"] = None  # other rows than those it was trained on
    return {
        "model_name_or_path": saved.get("base_model"),
        "quantization_bit": saved.get("quantization_bit") or None,
        **told,
    }


def decider(given, told) -> str:
    """Who has decided a flag: the flag itself, the checkpoint, or the default."""
    return "flag" if given is not None else "default" if told is None else "checkpoint"


def contradiction(name, given, trained_with, checkpoint) -> ValueError:
    """The error for a flag that contradicts a checkpoint."""
    return ValueError(
        f"--{name} {given} contradicts {checkpoint}, which was trained with {trained_with}. Leave the flag out: it is "
        "read from the checkpoint."
    )


def resolve_session(given: dict, found: list, *, do_train=False, resumes=False) -> Session:
    """The Session of flags {name: value, None where not given} and of the checkpoint folders that find_trained found.

    `resumes`: a run goes on from the checkpoint. ValueError where a flag contradicts the checkpoint, where a run would
    start from several, and for a checkpoint that read_settings refuses.
    """
    saved = read_settings(found)
    checkpoint = found[-1] if found else None
    if len(found) > 1 and do_train and METHODS[saved["finetuning_type"]].beside_model:
        raise ValueError(f"--ptuning_checkpoint {given['ptuning_checkpoint']}: a run starts from one checkpoint.")
    stage = given.get("stage")
    method = METHODS[given.get("finetuning_type") or saved.get("finetuning_type") or default_method(stage)]
    defaults = {name: EFFICIENT_TUNING.get(name, old) if stage else old for name, old in DATA_FIELDS.items()}
    resume_adapter = given.get("resume_lora_training", True) or resumes
    flags = method.normalized({**given, "model_name_or_path": given.get("model_name_or_path") or None})
    bound = {name: saved[name] for name in method.bound_flags(resume_adapter) if name in saved}
    # Else what was trained is a base of its own.
    if saved.get("prompt_template") and (resumes or (resume_adapter and not method.is_complete)):
        bound["prompt_template"] = saved["prompt_template"]
    for name, value in bound.items():
        if flags.get(name) not in (None, value):
            raise contradiction(name, flags[name], value, checkpoint)
    own_base = {"model_name_or_path": str(checkpoint)} if method.is_complete and checkpoint and not resumes else {}
    flags |= dict.fromkeys(own_base)  # a whole model needs nothing of another base
    told = {**bound, **remembered(saved, flags), **own_base}
    holds = {name: told.get(name) if flags.get(name) is None else flags[name] for name in (*METHOD_FLAGS, *told)}
    return Session(
        method=method,
        base=holds["model_name_or_path"],
        quantization_bit=holds["quantization_bit"],
        settings={name: holds[name] for name in METHOD_FLAGS},
        data_fields={name: default if holds[name] is None else holds[name] for name, default in defaults.items()},
        found=found,
        checkpoints=method.to_load(saved.get("checkpoints", [])),
        saved=saved,
        do_train=do_train,
        resumes=resumes,
        resume_adapter=resume_adapter,
        model_family=given.get("model_family"),
        decided_by={name: decider(flags.get(name), told.get(name)) for name in ("finetuning_type", *holds)},
    )


def session_of(model_args, data_args, say, *, do_train=False, resumes=False) -> Session:
    """The Session of the flags of a run, which hold from now on what it says.

    `say` is told of checkpoints that are passed over. Raises as find_trained and resolve_session.
    """
    found, damaged = find_trained(model_args.ptuning_checkpoint)
    for problem in damaged:
        say(f"{problem} It is passed over.")
    session = resolve_session(vars(model_args) | vars(data_args), found, do_train=do_train, resumes=resumes)
    session.fill_flags(model_args, data_args)
    return session


def open_run(session: Session, model_args, data_args, training_args, **shape):
    """(configuration, tokenizer) of a run's base model; `shape` is that of its prefix. Raises as open_base and
    check_base."""
    source = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir}
    source["weights"] = not data_args.check_data
    config = open_base(session, data_args, training_args, **source, **shape)
    check_base(session)
    return config, load_tokenizer(session.folder, config, prompt_template=data_args.prompt_template)


def open_base(session: Session, *groups, revision=None, cache_dir=None, weights=True, **overrides) -> ChatGLMConfig:
    """Find the folder of the base model and read its configuration, with `overrides`; `folder` and `config` hold them.

    `groups` are arguments whose flags the model's family must allow. Without `weights` the hub is asked for configuration
    and tokenizer only. Raises as resolve_folder and read_config.
    """
    session.folder = resolve_folder(session.base, revision, cache_dir, weights=weights)
    remembered, fields = session.saved.get("model_family"), session.data_fields
    session.config = read_config(session.folder, session.model_family, remembered=remembered, **overrides)
    family = family_of(session.config)
    session.model_family = family.name
    for checkpoint in [] if session.method.is_complete else session.checkpoints:
        check_same_family(checkpoint, session.base, family)
    check_flags_of(family, *groups)
    fields["prompt_template"] = check_template(fields["prompt_template"], family)
    return session.config


def check_base(session: Session):
    """Fill in `bits`. ValueError where this base model cannot be tuned, or answer, as the session says."""
    session.bits = check_quantization_bit(session.quantization_bit, session.config.quantization_bit)
    session.method.check(
        session.own_settings,
        session.config,
        session.checkpoints,
        session.bits,
        do_train=session.do_train,
        resume=session.resume_adapter,
    )


def check_engine(session: Session, engine: str | None):
    """ValueError where a run resumes whose optimizer was divided in another way than by `engine`."""
    written = session.saved.get("engine")
    if session.resumes and written != engine:
        raise ValueError(
            f"{session.checkpoint} was written {f'with --{written}' if written else 'without an engine'}, and its "
            f"optimizer is continued the same way only. This run has "
            f"{f'--{engine}' if engine else 'neither --deepspeed nor --fsdp'}."
        )
