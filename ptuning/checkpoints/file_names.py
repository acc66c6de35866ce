"""The files of weights in a folder, by their names. It loads no torch, so that a missing one is told at once."""

from pathlib import Path

from common.files import read_json

# The official name; holds what was trained as plain tensors: transformer.prefix_encoder.*, or what freeze trains.
TENSORS_FILE = "pytorch_model.bin"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FINETUNING_FILE = "finetuning_args.json"  # ChatGLM-Efficient-Tuning's, beside what it has trained: the flags of the way
# Of preference training: what makes a number of a hidden state, with ChatGLM-Efficient-Tuning's name and keys, and the
# values with which what trains has begun.
VALUE_HEAD_FILE = "value_head.bin"
REFERENCE_FILE = "reference.bin"
SIGNATURE_FILE = "signature.safetensors"  # what prompts it was trained on look like; see tuning/signature.py
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def weight_files(folder: Path | str) -> list[Path]:
    """The weight files of a model folder, in order: those of its index, or the single one."""
    folder = Path(folder)
    for name in INDEX_FILES:
        if (folder / name).is_file():
            weight_map = read_json(folder / name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{folder / name} has no weight_map. Download it again.")
            files = weight_map.values()
            strange = [file for file in files if not isinstance(file, str) or Path(file).name != file or file == ".."]
            if strange:
                raise ValueError(f"{folder / name} names {strange[0]!r}, which is no file in its folder.")
            files = [folder / file for file in sorted(set(weight_map.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(missing)} ({len(missing)} of {len(files)} weight files that {name} "
                    "names). Download the rest."
                )
            return files
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(
        f"{folder} holds no weights; expected {', '.join(INDEX_FILES)}, or {' or '.join(SINGLE_FILES)}."
    )
