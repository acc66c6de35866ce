"""Files of a stranger that claim more than they have: refused before they are read, in little memory."""

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import save_file

from checkpoint import load_model, load_tokenizer, read_config
from checkpoints.file_names import TENSORS_FILE, weight_files
from checkpoints.run_folder import CHECKSUM_FILE, verify_checkpoint
from checkpoints.weight_files import read_tensors
from common.claims import MOST_JSON_BYTES, check_torch_file, path_inside
from common.failure import describe
from common.files import STATE_FILE, read_json
from data.dataset_info import read_dataset_info
from training.resume import find_resume_checkpoint
from tuning.lora import add_adapter, load_adapters, save_adapter

TERA = 2**40
LARGE = 200_000_000  # bytes of a claim that this machine could meet
MOST_GROWTH = 60_000_000  # bytes of memory that a refusal may take


# ---- how such files are made


class Claim:
    """Pickled as a float32 tensor of `shape` and `stride` over `numel` numbers of storage 0."""

    def __init__(self, numel, shape, stride=(1,)):
        self.numel, self.shape, self.stride = numel, shape, stride


class Pickler(pickle.Pickler):
    """Writes what torch.save would, but for what a Claim says."""

    legacy = False

    def persistent_id(self, value):
        if isinstance(value, tuple) and len(value) == 2 and value[0] == "storage":
            end = (None,) if self.legacy else ()
            return ("storage", torch.FloatStorage, "0", "cpu", value[1], *end)
        return None

    def reducer_override(self, value):
        if not isinstance(value, Claim):
            return NotImplemented
        storage = ("storage", value.numel)
        arguments = (storage, 0, value.shape, value.stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class LegacyPickler(Pickler):
    legacy = True


def pickled(value, pickler=Pickler):
    buffer = io.BytesIO()
    pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def torch_zip(data, numbers=bytes(16), compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {"data.pkl": data, "data/0": numbers, "version": b"3\n", **members}.items():
            archive.writestr(f"x/{name}", content)
    return buffer.getvalue()


def deflated(data=b"", **members):
    return torch_zip(data, compression=zipfile.ZIP_DEFLATED, **members)


def legacy(value, start=b""):
    """A file from before torch 1.6: five pickles, then the numbers."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    opened = io.BytesIO(buffer.getvalue())
    for _ in range(3):  # magic number, version, system
        pickle.load(opened)
    head = buffer.getvalue()[: opened.tell()]
    return start + head + pickled(value, LegacyPickler) + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def two_tables_of_contents():
    """A zip file that looks harmless to whoever reads the table in front of its end, and not to torch."""
    evil, good = deflated(bytes(LARGE)), torch_zip(pickled({"w": torch.ones(4)}))
    length, start = struct.unpack("<2L", good[-10:-2])
    padding = bytes(len(evil))
    return (
        evil[:-22]
        + padding
        + good[:-22]
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, length, len(evil) - 22 - length, 0)
    )


def safetensors_header(length):
    return struct.pack("<Q", length) + b"{" + b" " * ((length if length < 2**30 else 64) - 2) + b"}" + bytes(64)


W = {"w": Claim(4, (4,))}
# What is wrong with a weight file, its name, its content, what is said.
WEIGHTS = [
    ("a compressed pickle", TENSORS_FILE, lambda: deflated(bytes(LARGE)), "compressed and claims 200,000,000 bytes"),
    ("compressed numbers", TENSORS_FILE, lambda: deflated(pickled(W), numbers=bytes(LARGE)), "is compressed"),
    ("a compressed byte order", TENSORS_FILE, lambda: deflated(pickled(W), byteorder=bytes(LARGE)), "is compressed"),
    ("a compressed adapter", "adapter_model.bin", lambda: deflated(bytes(LARGE)), "is compressed"),
    ("a pickle of empty sets", TENSORS_FILE, lambda: torch_zip(b"\x80\x04(" + b"\x8f" * 2_000_000 + b"l."), "1,048,576"),
    ("a long pickle", TENSORS_FILE, lambda: torch_zip(bytes(2_000_000)), "has 2,000,000 bytes, expected at most 1,048,576"),
    ("a long version", TENSORS_FILE, lambda: torch_zip(pickled(W), version=bytes(2_000_000)), "expected at most 1,048,576"),
    ("two tables of contents", TENSORS_FILE, two_tables_of_contents, "its table of contents claims"),
    ("a comment at the end", TENSORS_FILE, lambda: torch_zip(pickled(W))[:-2] + b"\1\0x", "its end is missing"),
    ("a storage of 4 TB", TENSORS_FILE, lambda: torch_zip(pickled({"w": Claim(TERA, (TERA,))})), "w claims 4,398,046,511,104"),
    ("a tensor of 4 TB over 16 bytes", TENSORS_FILE, lambda: torch_zip(pickled({"w": Claim(4, (TERA,), (0,))})),
     "w claims 4,398,046,511,104 bytes, and the file has 16 for it"),
    ("an old file of 4 TB", TENSORS_FILE, lambda: legacy({"w": Claim(TERA, (TERA,))}), "4398046511104 bytes"),
    ("an old tensor of 4 TB over 16 bytes", TENSORS_FILE, lambda: legacy({"w": Claim(4, (TERA,), (0,))}),
     "w claims 4,398,046,511,104 bytes, and the file has 16 for it"),
    ("an old file with a long pickle", TENSORS_FILE, lambda: legacy({"w": ["x"] * 1_500_000}), "more than 1,048,576 bytes"),
    ("a long pickle before an old file", TENSORS_FILE, lambda: legacy(W, pickle.dumps([[] for _ in range(1_000_000)], 2)),
     "more than 1,048,576 bytes"),
    ("a text of 2 GB that an old pickle claims", TENSORS_FILE, lambda: b"\x80\x02X" + struct.pack("<L", 2**31) + b"x.",
     "more than 1,048,576 bytes"),
    ("a safetensors header of 4 TB", "model.safetensors", lambda: safetensors_header(TERA), "header claims 1,099,511,627,776"),
    ("a safetensors header of 32 MB", "model.safetensors", lambda: safetensors_header(2**25), "header claims 33,554,432"),
]  # fmt: skip

MEASURE = """
import resource, sys
from pathlib import Path
from checkpoints.weight_files import read_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for folder in sys.argv[1:]:
    (file,) = Path(folder).iterdir()
    before, said = peak(), "accepted"
    try:
        for _ in read_tensors(file):
            pass
    except ValueError as error:
        said = str(error)
    print(folder, peak() - before, said, sep="\\t", flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """{what is wrong: (bytes of memory that reading the file took, what was said)}, from one process for all."""
    here = tmp_path_factory.mktemp("claims")
    folders = {}
    for number, (name, file, content, _) in enumerate(WEIGHTS):
        folder = here / str(number)
        folder.mkdir()
        (folder / file).write_bytes(content())
        folders[str(folder)] = name
    words = [sys.executable, "-c", MEASURE, *folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ptuning")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {folders[folder]: (int(growth), said) for folder, growth, said in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param((case[0], case[3]), id=case[0]) for case in WEIGHTS])
def test_a_weight_file_that_claims_too_much_is_refused_in_little_memory(case, refusals):
    name, says = case
    growth, said = refusals[name]
    assert "cannot be read as model weights" in said and says in said
    assert growth < MOST_GROWTH


def test_a_claim_of_4_tb_is_not_answered_with_the_batch_size(tmp_path):
    (tmp_path / TENSORS_FILE).write_bytes(legacy({"w": Claim(TERA, (TERA,))}))
    with pytest.raises(ValueError, match="cannot be read as model weights") as caught:
        list(read_tensors(tmp_path / TENSORS_FILE))
    message, status = describe(caught.value)
    assert status == 2 and TENSORS_FILE in message and "batch size" not in message


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_is_taken(zipped, tmp_path):
    base = torch.arange(12.0)
    tensors = {"w": base, "half": base[3:9], "turned": base.view(3, 4).T, "none": torch.zeros(0), "one": base[0]}
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = dict(read_tensors(tmp_path / "x.bin"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("claim", [{"r": 10**9}, {"rank_pattern": {"query_key_value": 10**9}}])
def test_an_adapter_that_claims_a_rank_its_matrices_have_not_is_refused(claim, tmp_path):
    from peft import LoraConfig

    model = load_model(TINY)
    add_adapter(model, LoraConfig(r=2, target_modules=["query_key_value"]))
    save_adapter(model, tmp_path, "tiny")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **claim}))
    with pytest.raises(ValueError, match="adapter_config.json: claims a rank of 1,000,000,000, .* have at most 2"):
        load_adapters(load_model(TINY), [tmp_path], do_train=False)


def test_an_optimizer_of_all_weights_of_the_6b_has_a_pickle_far_below_the_bound(tmp_path):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(28 * 7 + 4)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros(1)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    check_torch_file(tmp_path / "optimizer.pt")
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as archive:
        assert archive.getinfo("optimizer/data.pkl").file_size < 2**20 // 8


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "scaler.pt"])
@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_compressed_state_of_the_trainer_is_not_resumed_from(name, with_checksums, tmp_path):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / file)
    (folder / STATE_FILE).write_text(json.dumps({"global_step": 5, "train_batch_size": 1, "log_history": []}))
    torch.save({}, folder / TENSORS_FILE)
    assert find_resume_checkpoint(folder, tmp_path)[0] == str(folder)
    (folder / name).write_bytes(deflated(bytes(1000)))
    if with_checksums:
        (folder / CHECKSUM_FILE).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} cannot be read .*is compressed"):
        find_resume_checkpoint(folder, tmp_path)


# ---- text files


def sparse(file, size):
    """A file of `size` zero bytes that takes no room on the disk."""
    with open(file, "wb") as opened:
        opened.truncate(size)


@pytest.mark.parametrize(
    "name", ["config.json", "ptuning.json", "pytorch_model.bin.index.json", CHECKSUM_FILE, STATE_FILE]
)
def test_a_json_file_of_gigabytes_is_not_read(name, tmp_path):
    sparse(tmp_path / name, 3 * 2**30)
    with pytest.raises(ValueError, match=f"{name} has 3,221,225,472 bytes, expected at most"):
        read_json(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_of_gigabytes_is_not_read(name, tmp_path):
    for file in TINY.glob("*"):
        if file.suffix in (".json", ".model"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    sparse(tmp_path / name, 3 * 2**30)
    with pytest.raises(ValueError, match=f"{name} has 3,221,225,472 bytes"):
        load_tokenizer(tmp_path, read_config(tmp_path))


def test_a_description_of_data_sets_of_gigabytes_is_not_read(tmp_path):
    sparse(tmp_path / "dataset_info.json", MOST_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="dataset_info.json has 16,777,217 bytes"):
        read_dataset_info(tmp_path, "x")


# ---- names


@pytest.fixture
def secret(tmp_path):
    """A file beside the folder that is read."""
    file = tmp_path / "secret"
    file.write_text("root:x:0:0\n")
    return file


@pytest.fixture
def folder(tmp_path, secret):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    return folder


NAMES = ["../secret", "a/../../secret", "{secret}", "link", "..", "x\0y"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 11])
def test_checksums_do_not_tell_of_files_outside_their_folder(name, size, folder, secret):
    name = name.format(secret=secret)
    (folder / CHECKSUM_FILE).write_text(json.dumps({name: {"size": size, "sha256": "0"}}))
    with pytest.raises(ValueError, match="which leads out of") as caught:
        verify_checkpoint(folder)
    assert "bytes" not in str(caught.value) and "sha256" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_description_of_data_sets_shows_nothing_of_a_file_outside_its_folder(name, folder, secret):
    name = name.format(secret=secret)
    (folder / "dataset_info.json").write_text(json.dumps({"x": {"file_name": name}}))
    with pytest.raises(ValueError, match="which leads out of") as caught:
        read_dataset_info(folder, "x")
    assert "root:x" not in str(caught.value)


def test_a_description_of_data_sets_that_lies_elsewhere_is_not_shown(folder, secret):
    secret.write_text("12345")
    (folder / "dataset_info.json").symlink_to(secret)
    with pytest.raises(ValueError, match="which leads out of") as caught:
        read_dataset_info(folder, "x")
    assert "12345" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "{secret}", ".."])
def test_an_index_names_no_file_outside_its_folder(name, folder, secret):
    index = {"weight_map": {"transformer.x": name.format(secret=secret)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match="no file in its folder"):
        weight_files(folder)


def test_links_within_a_folder_and_within_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(1)}, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "again").symlink_to("model.safetensors")
    (tmp_path / "best").symlink_to(snapshot)
    for name in ("model.safetensors", "again"):
        assert path_inside(tmp_path / "best", name, "x").is_file()
