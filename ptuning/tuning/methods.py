"""The ways to tune ChatGLM2: a prefix, all weights, some layers, a LoRA adapter, or nothing.

Answers to the official `main.py` and `ds_train_finetune.sh`, and to ChatGLM-Efficient-Tuning's `--finetuning_type`.
Each way is an object of a file of its own; LoRA is PEFT's.

    method     trains, in float32                         a checkpoint holds, beside the sidecar ptuning.json
    p_tuning   the prefix encoder                         its tensors, official names, in pytorch_model.bin
    full       every weight                               a complete base model in the official layout
    freeze     mlp or query_key_value of some layers      these tensors, official names, in pytorch_model.bin
    lora       two narrow matrices beside some linears    PEFT's adapter_config.json, adapter_model.safetensors
    none       nothing                                    -

Weights that train are float32, also where the others are bf16 or fp16: the products are then made in half precision by
autocast (full, freeze), or the adapter computes in float32 (lora).
"""

from checkpoints.run_folder import find_checkpoints, names_in
from checkpoints.sidecar import finetuning_type
from checkpoints.ways import DEFAULT_METHOD
from tuning.freeze import Freeze
from tuning.full import Full
from tuning.lora import Lora
from tuning.method import Method
from tuning.none import Untouched
from tuning.p_tuning import PTuning

METHODS: dict[str, Method] = {method.name: method for method in (PTuning(), Full(), Freeze(), Lora(), Untouched())}


def method_of(checkpoint) -> Method:
    """The way in which a checkpoint folder was trained; one without a sidecar and without an adapter holds a prefix."""
    return METHODS[finetuning_type(checkpoint) or DEFAULT_METHOD]


def find_trained(text, prefixes=False):
    """(the checkpoint folders that `--ptuning_checkpoint` means, what is wrong with others that were passed over).

    As find_checkpoints says, or several LoRA adapters with commas, or where they may be, several `prefixes`. Raises
    FileNotFoundError and ValueError.
    """
    if not text:
        return [], []
    names = names_in(text)
    if names == [text]:
        found, damaged = find_checkpoints(text)
        if len(found) > 1 and not all(method_of(folder).beside_model for folder in found):
            raise ValueError(
                f"--ptuning_checkpoint {text}: only prefixes are evaluated one by one. Give one checkpoint."
            )
        return found, damaged
    parts = [find_checkpoints(name) for name in names]
    found = [folders[-1] for folders, _ in parts]
    kinds = [method_of(folder) for folder in found]
    beside = prefixes and all(kind.beside_model for kind in kinds)
    if not found or not (beside or all(kind.stacks for kind in kinds)):
        listed = ", ".join(f"{folder}: {kind.name}" for folder, kind in zip(found, kinds, strict=True))
        several = "prefixes, or for LoRA adapters," if prefixes else "LoRA adapters"
        raise ValueError(f"Several checkpoints can be given for {several} only; found {listed}. Give one of them.")
    return found, [problem for _, damaged in parts for problem in damaged]


def read_settings(checkpoints):
    """What checkpoints say of themselves: finetuning_type, quantization_bit, the sidecar's keys, and `checkpoints`.

    The last one counts. `checkpoints` are the folders to load one after the other: those given, or for one LoRA
    adapter also those that had been merged before it was trained. {} where none is given.

    Raises FileNotFoundError and ValueError, naming the folder: nothing trained in it, or damaged.
    """
    if not checkpoints:
        return {}
    method = method_of(checkpoints[-1])
    return {**method.read_settings(checkpoints), "finetuning_type": method.name}


def prepare_model(model, method, checkpoints=(), *, do_train=False, resume_lora_training=True, **settings):
    """Fill a loaded base model with what checkpoints hold, and set what trains. Returns a line on it, or None.

    `method` is a name, `settings` are flags of it; those left out, or None, have their defaults.
    """
    method = METHODS[method]
    settings = method.complete(settings)
    return method.prepare(model, checkpoints, settings, do_train=do_train, resume=resume_lora_training)


def save_trained(model, folder, sidecar, tensors=None):
    """Write what trained, and the sidecar; `tensors` are the model's where it has not all of them itself."""
    METHODS[sidecar["finetuning_type"]].save(model, folder, sidecar, tensors)


def load_trained(model, folder, method):
    """Read what `save_trained` wrote back into a model that trains. ValueError for other names or shapes."""
    METHODS[method].load(model, folder)
