"""full: every weight of the model trains. A checkpoint is a complete base model."""

import torch

from checkpoint import family_of, save_model
from checkpoints.file_names import weight_files
from checkpoints.weight_files import read_tensors
from tuning.method import Method


class Full(Method):
    """Every weight trains, in float32. A checkpoint holds all of them in the official layout (checkpoint.py)."""

    name = "full"
    changes_weights = all_in_float32 = is_complete = True

    def prepare(self, model, checkpoints, settings, *, do_train=False, resume=True):
        model.requires_grad_(False)
        if not do_train:
            return None
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # as engines want what they divide
            parameter.requires_grad_(True)
        return "All weights."

    def write(self, model, folder, sidecar, tensors):
        save_model(model, folder, tensors=tensors)

    def load(self, model, folder):
        parameters = dict(model.named_parameters())
        own_name = family_of(model.config).names.own_name
        with torch.no_grad():
            for file in weight_files(folder):
                for stored_name, tensor in read_tensors(file):
                    if (name := own_name(stored_name)) in parameters:
                        parameters[name].copy_(tensor)
