"""Checkpoints: written while training goes on, whole or not used, and loading them runs no code."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from moved_policies import adapted, moved
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from medground import checkpoint as module
from medground.checkpoint import CheckpointError, Checkpoints, _LayoutReader
from medground.checkpoint_folder import MANIFEST, _manifest, complaints, describe
from medground.config import LoraConfig
from medground.policy import load_policy
from medground.sharding import join_ranks, shard


def trained(policy) -> list[torch.Tensor]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def whole(policy) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().detach().clone() for name, parameter in policy.named_parameters()}


@contextmanager
def keeping(folder: Path, ranks, keep: int = 2):
    checkpoints = Checkpoints(folder, ranks, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@pytest.fixture
def saved(base_folder: Path, tmp_path: Path):
    """A saved checkpoint, with what it takes to load it."""
    with join_ranks() as ranks, keeping(tmp_path, ranks) as checkpoints:
        policy = shard(moved(base_folder), ranks, "float32")
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        checkpoints.save(3, policy, optimizer, {"skipped": 1})
        checkpoints.wait()
        yield tmp_path, checkpoints, policy, optimizer


def shift(policy, by: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(by)


def test_what_is_saved_is_the_state_at_that_moment(saved, monkeypatch):
    """Training goes on while the thread waits to write."""
    folder, checkpoints, policy, optimizer = saved
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = whole(policy)
    moments = [optimizer.state[p]["exp_avg"].full_tensor().clone() for p in policy.parameters()]
    asked, inner = [], module.dcp.save
    monkeypatch.setattr(module.dcp, "save", lambda *a, **k: (asked.append(1), shift(policy, 1.0), inner(*a, **k)))
    checkpoints.save(5, policy, optimizer, {"skipped": 0})
    optimizer.step()
    checkpoints.wait()
    assert asked
    assert checkpoints.load(policy, optimizer) == (5, {"skipped": 0})
    assert all(torch.equal(value, before[name]) for name, value in whole(policy).items())
    for parameter, moment in zip(policy.parameters(), moments, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"].full_tensor(), moment)


def test_the_newest_are_kept(saved):
    folder, checkpoints, policy, optimizer = saved
    (folder / ".step-000009.partial").mkdir()
    for step in (7, 11):
        checkpoints.save(step, policy, optimizer, {})
    checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000007", "step-000011"]
    assert checkpoints.load(policy, optimizer) == (11, {})


def test_without_a_checkpoint(base_folder: Path, tmp_path: Path):
    with join_ranks() as ranks, keeping(tmp_path / "none", ranks) as checkpoints:
        policy = shard(load_policy(base_folder), ranks, "float32")
        assert checkpoints.load(policy, torch.optim.AdamW(policy.parameters())) == (0, {})


def damage(file: Path, kind: str) -> None:
    data = file.read_bytes()
    if kind == "removed":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :])


def test_whatever_is_damaged_the_one_before_is_used(saved, capsys):
    folder, checkpoints, policy, optimizer = saved
    before = whole(policy)
    shift(policy, 1.0)
    checkpoints.save(4, policy, optimizer, {})
    checkpoints.wait()
    good = folder.parent / "good"
    shutil.copytree(folder, good)
    names = sorted(path.name for path in (good / "step-000004").iterdir())
    assert names == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]
    for name in names:
        for kind in ("removed", "truncated", "flipped"):
            shutil.rmtree(folder)
            shutil.copytree(good, folder)
            damage(folder / "step-000004" / name, kind)
            shift(policy, 1.0)
            assert checkpoints.load(policy, optimizer) == (3, {"skipped": 1}), (name, kind)
            said = capsys.readouterr().err
            assert f"damaged checkpoints: {folder}/step-000004/{name}: " in said and "going on from step-000003" in said
            assert all(torch.equal(value, before[name]) for name, value in whole(policy).items())
            assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000004.broken"]


def test_nothing_whole_is_no_reason_to_begin_anew(saved):
    folder, checkpoints, policy, optimizer = saved
    damage(folder / "step-000003" / "state.json", "removed")
    with pytest.raises(ValueError, match=r"want a checkpoint that is whole; got none: .*state\.json: missing"):
        checkpoints.load(policy, optimizer)
    assert (folder / "step-000003").exists()


@contextmanager
def full_disk(most: int):
    """No file may grow beyond `most` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [100, 100_000], ids=["at the small files", "at the weights"])
def test_a_full_disk_leaves_the_last_checkpoint(most: int, saved):
    folder, checkpoints, policy, optimizer = saved
    before = whole(policy)
    shift(policy, 1.0)
    assert not checkpoints.failed
    with full_disk(most):
        checkpoints.save(4, policy, optimizer, {})
        with pytest.raises(CheckpointError, match=r"could not be written: .* GB are free there\); the last one is"):
            while not checkpoints.failed:
                pass
            checkpoints.wait()
    assert [path.name for path in folder.iterdir()] == ["step-000003"] and not checkpoints.failed
    assert checkpoints.load(policy, optimizer)[0] == 3
    assert all(torch.equal(value, before[name]) for name, value in whole(policy).items())
    checkpoints.save(4, policy, optimizer, {})
    checkpoints.wait()
    assert complaints(folder / "step-000004") == []


def test_a_failed_save_stops_the_next(saved, monkeypatch):
    folder, checkpoints, policy, optimizer = saved

    def refuse(*_):
        raise OSError(13, "Permission denied", "/somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", refuse)
        checkpoints.save(4, policy, optimizer, {})
        with pytest.raises(CheckpointError, match=r"/somewhere: Permission denied .*; the last one is step-000003"):
            checkpoints.save(5, policy, optimizer, {})


def test_a_checkpoint_has_the_adapters_alone(base_folder: Path, tmp_path: Path):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=4, alpha=8)
    with join_ranks() as ranks, keeping(tmp_path, ranks) as checkpoints:
        policy = adapted(base_folder, lora, ranks)
        checkpoints.save(3, policy, torch.optim.AdamW(trained(policy)), {})
        checkpoints.wait()
        names = _LayoutReader(tmp_path / "step-000003").read_metadata().state_dict_metadata
        assert len(names) == 4 * len(trained(policy)) and all(".lora_" in name for name in names)
        again = adapted(base_folder, lora, ranks)
        moments = torch.optim.AdamW(trained(again))
        assert checkpoints.load(again, moments) == (3, {})
        for ours, theirs in zip(again.parameters(), policy.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        for field, other in (("rank", 2), ("alpha", 4), ("targets", "mlp")):
            policy = adapted(base_folder, dataclasses.replace(lora, **{field: other}), ranks)
            said = f"step-000003: want a checkpoint of model.lora.{field} {other!r}; got {getattr(lora, field)!r}"
            with pytest.raises(ValueError, match=said):
                checkpoints.load(policy, moments)
        with pytest.raises(ValueError, match=r"step-000003: want a checkpoint of model\.lora\.rank 0; got 4"):
            checkpoints.load(shard(load_policy(base_folder), ranks, "float32"), moments)


class _Malice:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def forge(checkpoint: Path) -> None:
    """Make the manifest agree with the files, as whoever put them there can."""
    files = [path for path in checkpoint.iterdir() if path.name != MANIFEST]
    (checkpoint / MANIFEST).write_text(_manifest(describe(files)))
    assert complaints(checkpoint) == []


def test_a_malicious_pickle_is_not_executed(saved):
    folder, checkpoints, policy, optimizer = saved
    trap = folder / "executed"
    (folder / "step-000003" / ".metadata").write_bytes(pickle.dumps(_Malice(trap)))
    with pytest.raises(ValueError, match=r"other bytes than were written|want .* bytes"):
        checkpoints.load(policy, optimizer)
    forge(folder / "step-000003")
    with pytest.raises(ValueError, match="not the layout of a checkpoint: it names"):
        checkpoints.load(policy, optimizer)
    assert not trap.exists()


def test_a_tensor_that_claims_to_be_bytes_is_not_unpickled(saved):
    """DCP would read such an entry with torch.load(weights_only=False)."""
    folder, checkpoints, policy, optimizer = saved
    trap = folder / "executed"
    layout = folder / "step-000003" / ".metadata"
    metadata = pickle.loads(layout.read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    index = next(index for index in metadata.storage_data if index.fqn == name)
    torch.save(_Malice(trap), folder / "step-000003" / "payload")
    size = (folder / "step-000003" / "payload").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = dataclasses.replace(
        metadata.storage_data.pop(index), relative_path="payload", offset=0, length=size
    )
    layout.write_bytes(pickle.dumps(metadata))
    forge(folder / "step-000003")
    with pytest.raises(ValueError, match=r"it names .*BytesStorageMetadata"):
        checkpoints.load(policy, optimizer)
    assert not trap.exists()


def test_tensors_that_are_pickles_are_not_executed(saved):
    folder, checkpoints, policy, optimizer = saved
    trap = folder / "executed"
    torch.save(_Malice(trap), folder / "step-000003" / "__0_0.distcp")
    with (folder / "step-000003" / "__0_0.distcp").open("ab") as file:
        file.write(bytes(40_000_000))
    forge(folder / "step-000003")
    with pytest.raises(ValueError, match=r"not a checkpoint of this model: .*Weights only load failed"):
        checkpoints.load(policy, optimizer)
    assert not trap.exists()


def test_the_layout_holds_tensors_alone(saved):
    folder, *_ = saved
    metadata = _LayoutReader(folder / "step-000003").read_metadata()
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}
    state = json.loads((folder / "step-000003" / "state.json").read_text())
    assert state["facts"] == {"skipped": 1} and os.path.getsize(folder / "step-000003" / "__0_0.distcp") > 1000
