"""freeze: the mlp or the query_key_value of some layers trains. A checkpoint holds these tensors, official names."""

import re
from pathlib import Path

import torch

from checkpoint import family_of
from checkpoints.file_names import FINETUNING_FILE, TENSORS_FILE
from checkpoints.prefix import warn_of_other_base
from checkpoints.run_folder import check_holds
from checkpoints.weight_files import check_trained, read_tensors
from common.files import read_json
from tuning.method import Method, named

FREEZE_MODULES = {"mlp": "mlp", "qkv": "self_attention.query_key_value"}


def freeze_pattern(num_layers, num_layer_trainable, name_module_trainable):
    """A regular expression for the names of the tensors that train: exactly the last n layers, or the first -n."""
    layers = range(num_layers)[-num_layer_trainable:] if num_layer_trainable > 0 else range(-num_layer_trainable)
    numbers = "|".join(map(str, layers))
    return re.compile(
        rf"transformer\.encoder\.layers\.({numbers})\.{re.escape(FREEZE_MODULES[name_module_trainable])}\..+"
    )


def load_tensors(model, checkpoint):
    """Write a freeze checkpoint's tensors over the model's, all or ValueError."""
    file = check_holds(checkpoint, TENSORS_FILE)
    parameters = dict(model.named_parameters())
    own_name = family_of(model.config).names.own_name
    tensors = {own_name(name) or name: tensor for name, tensor in read_tensors(file)}
    for name, tensor in tensors.items():
        check_trained(tensor, name, file)
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "nothing of that name"
            raise ValueError(
                f"{file} does not fit this base model: {name} is {tuple(tensor.shape)}, the model has {found}."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


class Freeze(Method):
    """Some of the model's own weights train, in float32. A checkpoint holds them in pytorch_model.bin."""

    name = "freeze"
    defaults = {"num_layer_trainable": 3, "name_module_trainable": "mlp"}
    changes_weights = True

    def read_own(self, checkpoint):
        file = Path(checkpoint) / FINETUNING_FILE
        settings = (
            {name: value for name, value in read_json(file).items() if name in self.defaults} if file.is_file() else {}
        )
        count, module = {**self.defaults, **settings}.values()
        if type(count) is not int or count == 0 or module not in tuple(FREEZE_MODULES):
            raise ValueError(
                f"{file}: {settings} are no settings of freeze; expected a number of layers, and {' or '.join(FREEZE_MODULES)}."
            )
        return settings

    def check(self, settings, config, checkpoints, bits, *, do_train, resume):
        super().check(settings, config, checkpoints, bits, do_train=do_train, resume=resume)
        count = settings["num_layer_trainable"]
        if abs(count) > config.num_layers:
            raise ValueError(
                f"--num_layer_trainable {count}: this base model has {config.num_layers} layers. "
                "--finetuning_type full trains all weights."
            )

    def prepare(self, model, checkpoints, settings, *, do_train=False, resume=True):
        model.requires_grad_(False)
        count, module = settings["num_layer_trainable"], settings["name_module_trainable"]
        pattern = freeze_pattern(model.config.num_layers, count, module)
        for name, parameter in model.named_parameters():
            if do_train and pattern.fullmatch(name):
                parameter.data = parameter.data.float().contiguous()  # load_model() laid it out to be read
                parameter.requires_grad_(True)
        if checkpoints:
            load_tensors(model, checkpoints[-1])
            warn_of_other_base(model, checkpoints[-1])
        return f"{module} of the {'last' if count > 0 else 'first'} {abs(count)} layers{named(checkpoints)}."

    def remember(self, settings, checkpoints, bits, *, resume):
        return dict(settings)

    def write(self, model, folder, sidecar, tensors):
        official_name = family_of(model.config).names.official_name
        trained = {
            official_name(name): parameter.detach().cpu()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        torch.save(trained, folder / TENSORS_FILE)

    def load(self, model, folder):
        load_tensors(model, folder)
