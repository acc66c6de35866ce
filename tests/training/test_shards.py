"""Shards of FSDP and DeepSpeed are read without running code."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from training import shards


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-ran",)


@pytest.mark.parametrize("name", ["optimizer_0/.metadata", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("damage", ["payload", "noise"])
def test_a_shard_that_would_run_code_or_is_damaged_is_not_unpickled(name, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir()
    if damage == "noise":
        file.write_bytes(b"\x80\x02 no pickle")
    elif file.suffix == ".pt":
        torch.save({"optimizer": Payload()}, file)
    else:
        file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=f"{name} cannot be read .*--model_name_or_path {tmp_path}"):
        shards.check_shards(tmp_path)
    assert not Path("payload-ran").exists()


def test_a_shard_does_not_reach_a_function_by_way_of_a_module_that_may_be_named(tmp_path):
    (tmp_path / "optimizer_0").mkdir()
    names = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.getpid\x93"  # this module imports os
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(b"\x80\x04" + names + b")R.")
    with pytest.raises(ValueError, match="it names torch.distributed.checkpoint.metadata.os.getpid"):
        shards.check_shards(tmp_path)


def test_shards_of_tensors_and_plain_values_may_be_read(tmp_path):
    (tmp_path / "global_step2").mkdir()
    torch.save({"step": 2, "exp_avg": torch.zeros(3)}, tmp_path / "global_step2" / "mp_rank_00_model_states.pt")
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps((torch.Size([3]), torch.float16)))
    shards.check_shards(tmp_path)
