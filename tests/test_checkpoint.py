"""Checkpoints: what comes back, what is refused, and what a kill or a full disk leaves behind."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import atomic
import checkpoint
from checkpoint import (
    find_checkpoint,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    load_state,
    optimizer_tensors,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
)
from errors import RunFailed, UsageError

TENSORS = {
    "model.weight": torch.tensor([[1.5, float("nan")], [float("-inf"), 1e-45]]),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
    "random_state": torch.arange(16, dtype=torch.uint8),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"step": 500, "best": 0.1 + 0.2, "none": None, "nested": {"list": [1, 2.5, "ọ́"]}}
    folder = save_checkpoint(tmp_path, 500, TENSORS, state)
    assert folder == tmp_path / "checkpoints" / "step_000500"
    assert names(folder) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert names(folder.parent) == ["step_000500"]
    tensors, loaded_state = load_checkpoint(find_checkpoint(tmp_path, "last"))
    assert loaded_state == load_state(folder) == state
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        # As bytes, since NaN differs from itself.
        found, expected = (values.contiguous().reshape(-1).view(torch.uint8) for values in (tensors[name], tensor))
        assert torch.equal(found, expected)


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "tensors.safetensors", 100)


def damage_flip(folder: Path) -> None:
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(data)


def damage_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema_version": 1, "files"')


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "tensors.safetensors has 100 bytes"),
        (damage_flip, "checksum of tensors.safetensors"),
        (damage_state, "state.json cannot be read"),
        (damage_manifest, "is not a manifest"),
        (damage_no_manifest, "manifest.json cannot be read"),
        (damage_version, "schema version 99"),
    ],
)
def test_damaged_checkpoint_is_skipped_with_a_message(tmp_path: Path, damage, words: str) -> None:
    older, newer = (save_checkpoint(tmp_path, step, TENSORS, {}) for step in (100, 200))
    damage(newer)
    messages: list[str] = []
    assert find_checkpoint(tmp_path, "last", messages.append) == older
    assert len(messages) == 1
    assert words in messages[0]
    assert str(newer) in messages[0]
    with pytest.raises(UsageError, match=words):
        find_checkpoint(tmp_path, str(newer))
    prune_checkpoints(tmp_path, keep=1, report=messages.append)
    assert list_checkpoints(tmp_path) == [older, newer]
    assert "older checkpoints are kept" in messages[1]
    assert save_checkpoint(tmp_path, 200, TENSORS, {}) == newer
    assert find_damage(newer) is None


def test_named_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no intact checkpoint"):
        find_checkpoint(tmp_path, "last")
    older, _ = (save_checkpoint(tmp_path / "run", step, TENSORS, {}) for step in (100, 200))
    other = save_checkpoint(tmp_path / "other", 100, TENSORS, {})
    assert find_checkpoint(tmp_path / "run", str(older)) == older
    assert find_checkpoint(tmp_path / "run", "step_000100") == older
    for which in (str(other), "step_000300", str(tmp_path)):
        with pytest.raises(UsageError, match="not a checkpoint in"):
            find_checkpoint(tmp_path / "run", which)


def test_retention_and_steps_left_behind(tmp_path: Path) -> None:
    for step in (100, 200, 1_000_000):
        save_checkpoint(tmp_path, step, TENSORS, {"step": step})
        prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_000200", "step_1000000"]
    # Resumed at 200 and saved again: what follows from there replaces the later step.
    save_checkpoint(tmp_path, 300, TENSORS, {"step": 300})
    prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_000200", "step_000300"]
    prune_checkpoints(tmp_path, keep=1)
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path / "checkpoints") == ["step_000300"]


def test_leftovers_of_a_killed_save_are_no_checkpoints(tmp_path: Path) -> None:
    intact = save_checkpoint(tmp_path, 100, TENSORS, {})
    shutil.copytree(intact, intact.with_name("step_000200.unfinished"))
    assert find_checkpoint(tmp_path, "last") == intact
    save_checkpoint(tmp_path, 300, TENSORS, {})
    assert names(tmp_path / "checkpoints") == ["step_000100", "step_000300"]


def test_killed_replacement_of_a_checkpoint_is_mended_by_find(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 100, TENSORS, {})
    folder.rename(folder.with_name("step_000100.aside"))
    assert find_checkpoint(tmp_path, "last") == folder


def test_full_disk_names_path_and_space_and_keeps_what_was(small_disk: Path, monkeypatch) -> None:
    monkeypatch.setattr(atomic, "SPARE_BYTES", 0)
    folder = save_checkpoint(small_disk, 100, {"weight": torch.zeros(2_000_000)}, {})
    with pytest.raises(RunFailed, match=r"disk full at .*checkpoints: 16.0 MB needed, 1\d\.\d MB free"):
        save_checkpoint(small_disk, 200, {"weight": torch.zeros(4_000_000)}, {})
    # The space vanishes after the check: the operating system's own error, as safetensors reports it.
    monkeypatch.setattr(checkpoint, "check_free_space", lambda folder, num_bytes: None)
    with pytest.raises(RunFailed, match=r"disk full at .*step_000200: 16.0 MB needed"):
        save_checkpoint(small_disk, 200, {"weight": torch.zeros(4_000_000)}, {})
    assert names(small_disk) == ["checkpoints"]
    assert names(small_disk / "checkpoints") == ["step_000100"]
    assert find_checkpoint(small_disk, "last") == folder


def test_reserve_is_checked_before_a_save(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(RunFailed, match=r"1\.0 kB free"):
        save_checkpoint(tmp_path, 1, TENSORS, {})
    assert names(tmp_path / "checkpoints") == []


class Poison:
    def __reduce__(self):
        return os.system, ("touch poisoned",)


def saved_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


POISONS = {
    "pickle": pickle.dumps(Poison()),
    "pickle of ASCII": pickle.dumps(Poison(), protocol=0),
    "torch.save": saved_by_torch(Poison()),
}


def seal(folder: Path) -> None:
    """Make the manifest agree with the files, as whoever exchanges them would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_poisoned_checkpoint_is_not_executed(name: str, poison: bytes, tmp_path: Path, monkeypatch) -> None:
    """Its manifest gives it away; where that has been made to agree, the files themselves do."""
    monkeypatch.chdir(tmp_path)
    older, newer = (save_checkpoint(tmp_path, step, TENSORS, {}) for step in (100, 200))
    (newer / name).write_bytes(poison)
    assert find_checkpoint(tmp_path, "last", lambda _: None) == older
    if name != "manifest.json":
        seal(newer)
        found = find_checkpoint(tmp_path, "last")
        assert found == newer
        with pytest.raises(UsageError, match="step_000200 is not a checkpoint of this program"):
            load_checkpoint(found)
        if name == "state.json":
            with pytest.raises(UsageError, match="step_000200 is not a checkpoint of this program"):
                load_state(found)
    assert not (tmp_path / "poisoned").exists()
    os.system(Poison().__reduce__()[1][0])
    assert (tmp_path / "poisoned").exists(), "the poison does nothing"


# What loads may be called with, by module; `pickle` may load nothing.
SAFE_LOADS = {"torch": "weights_only=True", "np": "allow_pickle=False"}


def calls_that_run_code(source: str) -> Iterator[str]:
    """Calls and imports that could run what a file holds. Of pickle the program needs the class of its errors."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch", "numpy"):
            yield from (f"from {node.module} import load" for alias in node.names if "load" in alias.name)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ("dill", "cloudpickle", "joblib", "shelve"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            if node.attr != "UnpicklingError":
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            module, _, name = ast.unparse(node.func).rpartition(".")
            given = [ast.unparse(keyword) for keyword in node.keywords]
            if (name == "load" and module in SAFE_LOADS and SAFE_LOADS[module] not in given) or (
                "trust_remote_code=True" in given
            ):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(path, weights_only=True)", 0),
        ("isinstance(error, pickle.UnpicklingError)", 0),
        ("np.load(path, allow_pickle=False)", 0),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("np.load(path)", 1),
        ("pickle.load(file)", 1),
        ("pickle.Unpickler(file).load()", 1),
        ("from torch import load", 1),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", 1),
    ],
)
def test_calls_that_run_code_are_found(source: str, count: int) -> None:
    assert len(list(calls_that_run_code(source))) == count


def test_nothing_in_the_program_loads_pickles() -> None:
    """Promise 7."""
    paths = [path for folder in (REPOSITORY, REPOSITORY / "benchmarks") for path in folder.glob("*.py")]
    assert len(paths) > 40
    assert {path.name: found for path in paths if (found := list(calls_that_run_code(path.read_text())))} == {}


def make_training(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()


def test_resumed_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make_training(0)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 3e-3
    tensors, state = optimizer_tensors(model, optimizer)
    assert set(tensors) == {
        f"optimizer.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()
    }
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, 3, {**weights, **tensors}, {"optimizer": state})
    train(model, optimizer, range(3, 6))

    resumed_model, resumed_optimizer = make_training(1)
    loaded, loaded_state = load_checkpoint(find_checkpoint(tmp_path, "last"))
    resumed_model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in loaded.items() if name.startswith("model.")}
    )
    resumed_optimizer.param_groups[0]["lr"] = 3e-3
    restore_optimizer(resumed_model, resumed_optimizer, loaded, loaded_state["optimizer"])
    assert [group["lr"] for group in resumed_optimizer.param_groups] == [3e-3, 1e-2]
    train(resumed_model, resumed_optimizer, range(3, 6))
    for expected, found in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_groups_and_their_settings_are_those_of_the_run_that_resumes() -> None:
    """--resume_anyway with another weight decay or other rates by layer: the moments stay, the settings are new."""
    model, optimizer = make_training(0)
    train(model, optimizer, range(2))
    tensors, state = optimizer_tensors(model, optimizer)
    regrouped = [{"params": [one], "weight_decay": 0.3, "lr_scale": 0.5} for one in reversed(list(model.parameters()))]
    other = torch.optim.AdamW(regrouped)
    restore_optimizer(model, other, tensors, state)
    assert [(group["weight_decay"], group["lr_scale"]) for group in other.param_groups] == [(0.3, 0.5)] * 6
    for parameter, entries in optimizer.state.items():
        assert all(torch.equal(other.state[parameter][name], value) for name, value in entries.items())


def test_optimizer_of_other_parameters_is_refused() -> None:
    model, optimizer = make_training(0)
    train(model, optimizer, range(1))
    tensors, state = optimizer_tensors(model, optimizer)
    model[0].bias.requires_grad_(False)
    other = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    with pytest.raises(UsageError, match=r"trains 6 parameters and this run 5; they differ in 0\.bias"):
        restore_optimizer(model, other, tensors, state)
