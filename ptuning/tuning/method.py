"""What a way of tuning answers for itself; p_tuning.py, freeze.py, lora.py, full.py and none.py hold one each.

A new way is a file with a subclass of Method, a line in methods.py, and a row in checkpoints/ways.py.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from checkpoints.run_folder import trained_files, verify_checkpoint
from checkpoints.sidecar import SIDECAR_FILE, check_sidecar, read_sidecar
from checkpoints.ways import METHOD_FLAGS
from common.files import write_json
from tuning.rules import check_bits_train


class Method:
    """A way of tuning: what trains, and what a checkpoint holds. Errors are ValueError and FileNotFoundError.

    `settings` are {flag: value} of the flags that ways.py gives to the way, None where nothing has decided one.
    """

    name: str  # as --finetuning_type says it
    defaults: dict = {}  # of its flags
    changes_weights = False  # weights of the model itself train: autocast makes products in half precision
    all_in_float32 = False  # every weight trains, in float32
    is_complete = False  # a checkpoint is a whole model: it needs nothing of its base
    stacks = False  # several checkpoints are loaded one on the other
    beside_model = False  # the model stays as it is: checkpoints take turns, in one process and in one server

    # ---- what a checkpoint says

    def read_settings(self, checkpoints: list) -> dict:
        """{name: value} of what the last of some checkpoint folders says of itself.

        `checkpoints` among them are the folders to load one after the other.
        """
        for folder in checkpoints:
            verify_checkpoint(folder, trained_files(folder))
        settings = {**self.read_own(checkpoints[-1]), **read_sidecar(checkpoints[-1])}
        check_sidecar(settings, Path(checkpoints[-1]) / SIDECAR_FILE)
        merged = (settings.pop("merged_checkpoints", None) or []) if len(checkpoints) == 1 else []
        return {**settings, "checkpoints": [*merged, *checkpoints]}

    def read_own(self, checkpoint: Path) -> dict:
        """{name: value} of what a checkpoint's own files say; the sidecar may say more."""
        return {}

    def to_load(self, checkpoints: list) -> list:
        """Those of the checkpoint folders that are loaded onto a base model."""
        return [] if self.is_complete else checkpoints

    # ---- what flags say

    def normalized(self, flags: dict) -> dict:
        """The flags, with values that mean one thing spelled one way."""
        return flags

    def bound_flags(self, resume: bool) -> list:
        """Names of the flags that must be as in the checkpoint. Not `resume`: a new adapter trains on top of it."""
        return ["finetuning_type", *METHOD_FLAGS]

    def complete(self, settings: dict) -> dict:
        """{flag of this way: value}, defaults where `settings` decide nothing."""
        return {
            name: default if settings.get(name) is None else settings[name] for name, default in self.defaults.items()
        }

    def check(self, settings: dict, config, checkpoints: list, bits: int | None, *, do_train: bool, resume: bool):
        """ValueError where this way cannot tune the base model of `config`, its integer weights of `bits`."""
        check_bits_train(self.name, bits, do_train)

    # ---- the model

    def prepare(self, model: nn.Module, checkpoints: list, settings: dict, *, do_train=False, resume=True):
        """Fill a loaded base model with what checkpoint folders hold, and set what trains.

        `settings` are complete. `resume`: train the last adapter on. Returns a line on what the model is now, or None.
        """
        raise NotImplementedError

    def merge(self, model: nn.Module, checkpoints: list, settings: dict, probe) -> str:
        """Put what checkpoint folders hold into the float weights of a base model; a line that says so.

        `probe(model)` gives logits to compare. ValueError where they are other ones than before.
        """
        return self.prepare(model, checkpoints, settings)

    # ---- checkpoints

    def remember(self, settings: dict, checkpoints: list, bits: int | None, *, resume: bool) -> dict:
        """{name: value} for a checkpoint's sidecar: what its weights and config.json do not tell."""
        return {}

    def save(self, model: nn.Module, folder: Path, sidecar: dict, tensors: dict[str, Tensor] | None = None):
        """Write what trained, and the sidecar. `tensors` are the model's by name where it has not all of them itself."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(model, folder, sidecar, tensors)
        write_json(folder / SIDECAR_FILE, sidecar)

    def write(self, model: nn.Module, folder: Path, sidecar: dict, tensors: dict[str, Tensor] | None):
        """Write what trained into a folder."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path):
        """Read what `save` wrote back into a model that trains. ValueError for other names or shapes."""
        raise NotImplementedError


def named(checkpoints: list) -> str:
    """The folders that a line on the model names, or nothing."""
    return f" from {', '.join(map(str, checkpoints))}" if checkpoints else ""
