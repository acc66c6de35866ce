"""Ways to damage a folder of a model or a checkpoint."""

import json
import pickle
import shutil

import torch

from checkpoints.run_folder import CHECKSUM_FILE


def deep(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


def edit_json(file, **changes):
    """Change keys of a JSON file; a value of ... removes one."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.update(changes)
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def cut(name, size):
    """Leave `size` bytes of a file, or all but -`size`."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(name, position):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def no_permission(name):
    return lambda folder: (folder / name).chmod(0)


def edit_weights(file, edit):
    """Rewrite a torch file with `edit(tensors)` done to it."""

    def damage(folder):
        tensors = torch.load(folder / file, weights_only=True)
        edit(tensors)
        torch.save(tensors, folder / file)

    return damage


class Payload:
    """Unpickled, it would create a file called `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def torch_payload(name):
    return lambda folder: torch.save({"transformer.x": Payload()}, folder / name)


def pickle_payload(name, protocol=2):
    return write(name, pickle.dumps({"transformer.x": Payload()}, protocol))


SHARD, SHARD_2 = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def change(name, make):
    """An edit of weights: the tensor `name` becomes make(tensor)."""

    def edit(tensors):
        tensors[name] = make(tensors[name])

    return edit


def make_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


PREFIX = "pytorch_model.bin"


def copy_run(trained, folder):
    """A run without the checksums, as the official scripts leave one: every reader is on its own."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(CHECKSUM_FILE, ".lock"))
