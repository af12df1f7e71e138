"""Checkpoints that are whole or absent, and verified before they are trusted.

A checkpoint is a folder of the run directory:

    checkpoints/step_000500/tensors.safetensors   every tensor (weights, optimizer moments, averages)
                            state.json            everything else
                            manifest.json         size and SHA-256 of the two

Of a run that trains adapters or LoRA alone the weights are those that are trained; the state has the checksum of the
others, which are read from the model that the run began with.

No file is a pickle (promise 7). Only the main process writes, prunes, mends and searches; every rank may load.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from atomic import ASIDE, UNFINISHED, check_free_space, recover_folder, replace_folder, reporting_disk_errors
from errors import RunFailed, UsageError
from sharding import like

SCHEMA_VERSION = 2
TENSORS_FILE, STATE_FILE, MANIFEST_FILE = "tensors.safetensors", "state.json", "manifest.json"

State = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def save_checkpoint(run_dir: Path, step: int, tensors: Mapping[str, torch.Tensor], state: State) -> Path:
    """Write, verify and publish the checkpoint of `step`.

    Checkpoints of later steps are removed afterwards: a run that saves at `step` was resumed from before them, and
    "last" must not lead back to what it left behind.

    Args:
        run_dir: the run directory.
        step: optimizer steps done.
        tensors: any device; `load_checkpoint` gives them back bit for bit, on the CPU.
        state: JSON values; floats come back exactly.

    Returns:
        The folder of the checkpoint.

    Raises:
        RunFailed: not enough room (path, needed and free bytes are named) or what was written does not read back.
            Earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    unfinished = folder.with_name(folder.name + UNFINISHED)
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    num_bytes = sum(tensor.nbytes for tensor in packed.values())
    with reporting_disk_errors(folder, num_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        check_free_space(folder.parent, num_bytes)
        try:
            unfinished.mkdir()
            save_file(packed, unfinished / TENSORS_FILE)
            (unfinished / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            check_tensors(unfinished / TENSORS_FILE, packed)
            files = {name: _describe_file(unfinished / name) for name in (TENSORS_FILE, STATE_FILE)}
            manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
            (unfinished / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            replace_folder(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    for later in list_checkpoints(run_dir):
        if _step_of(later) > step:
            remove_checkpoint(later)
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Take a checkpoint away, under another name first: a kill half-way leaves none that looks damaged."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, intact or not."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted((folder for folder in folders if re.fullmatch(r"step_\d{6,}", folder.name)), key=_step_of)


def has_checkpoints(run_dir: Path) -> bool:
    """Whether there is any, intact or not; one that was swapped when a kill came counts."""
    return bool(list_checkpoints(run_dir) or list((run_dir / "checkpoints").glob(f"step_*{ASIDE}")))


def find_checkpoint(run_dir: Path, which: str, report: Callable[[str], None] = print) -> Path:
    """The checkpoint to resume from; every byte of it has been checked against its manifest.

    Args:
        run_dir: the run directory.
        which: "last" for the newest intact one, or a checkpoint folder of this run (its path or only its name).
        report: is told about each damaged one that is skipped.

    Raises:
        UsageError: there is none, or the one asked for is damaged or of another run.
    """
    for aside in (run_dir / "checkpoints").glob(f"step_*{ASIDE}"):
        recover_folder(aside.with_name(aside.name.removesuffix(ASIDE)))
    if which != "last":
        return _check_named(run_dir, which)
    for folder in reversed(list_checkpoints(run_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        report(f"skipping the damaged checkpoint {folder}: {damage}")
    raise UsageError(
        f"--resume_from_checkpoint last: {run_dir / 'checkpoints'} holds no intact checkpoint; `auto` starts over "
        "where there is none at all, or name a new --output_dir"
    )


def load_state(folder: Path) -> State:
    """The state alone of a checkpoint that `find_checkpoint` returned."""
    with _reading(folder):
        return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def load_checkpoint(folder: Path) -> tuple[Tensors, State]:
    """Tensors (on the CPU) and state of a checkpoint that `find_checkpoint` returned.

    Raises:
        UsageError: the files are not what their names say, though their checksums agree (made by another program).
    """
    with _reading(folder):
        return load_file(folder / TENSORS_FILE), load_state(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint (missing file, size, checksum), or None."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        version, files = manifest["schema_version"], manifest["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (TENSORS_FILE, STATE_FILE)}
    except OSError as error:
        return f"{MANIFEST_FILE} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is not a manifest"
    if version != SCHEMA_VERSION:
        return f"schema version {version}, this program reads {SCHEMA_VERSION}"
    for name, (num_bytes, sha256) in expected.items():
        try:
            found_bytes = (folder / name).stat().st_size
            if found_bytes != num_bytes:
                return f"{name} has {found_bytes} bytes, its manifest says {num_bytes}"
            if _describe_file(folder / name)["sha256"] != sha256:
                return f"the checksum of {name} differs from its manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def prune_checkpoints(run_dir: Path, keep: int, report: Callable[[str], None] = print) -> None:
    """Delete all but the `keep` newest checkpoints, and nothing at all unless the newest one verifies."""
    assert keep >= 1
    checkpoints = list_checkpoints(run_dir)
    if len(checkpoints) <= keep:
        return
    damage = find_damage(checkpoints[-1])
    if damage is not None:
        report(f"older checkpoints are kept, since {checkpoints[-1]} is damaged: {damage}")
        return
    for folder in checkpoints[:-keep]:
        remove_checkpoint(folder)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, State]:
    """The state of an optimizer by parameter name (`optimizer.exp_avg.<name>`), and its groups' settings as JSON.

    Of a model that is divided among processes, the tensors are this process' pieces.

    Args:
        model: the one whose parameters the optimizer holds, out of any DDP wrapper.
        optimizer: any whose per-parameter state is tensors (AdamW, with its step).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return tensors, {"param_groups": groups}


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], state: State
) -> None:
    """Give `optimizer` what `optimizer_tensors` took; other entries of `tensors` are passed over.

    Raises:
        UsageError: the checkpoint trains other parameters than this run.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    own_groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    own, saved = (
        {name for group in groups for name in group}
        for groups in (own_groups, [group["params"] for group in state["param_groups"]])
    )
    if own != saved:
        different = sorted(own ^ saved)[:3]
        raise UsageError(
            f"the checkpoint trains {len(saved)} parameters and this run {len(own)}; they differ in "
            f"{', '.join(different)}: resume with the model settings that the run began with"
        )
    indices = {name: index for index, name in enumerate(name for group in own_groups for name in group)}
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        prefix, _, rest = full_name.partition(".")
        if prefix == "optimizer":
            key, _, name = rest.partition(".")
            # A copy: loaded tensors are mapped from the checkpoint's file, which retention will delete.
            entries.setdefault(indices[name], {})[key] = like(tensor.clone(), parameters[name])
    # The groups and their settings stay this run's own: what a resume may change (--resume_anyway) counts from now on.
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def check_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Read a file just written and compare it with memory, byte for byte (equal NaNs included).

    Args:
        path: of a safetensors file.
        expected: any device; one at a time is copied to the CPU.

    Raises:
        RunFailed: names, shapes, types or bytes differ.
    """
    with safe_open(path, framework="pt") as file:
        # An empty tensor has no bytes to compare; shapes and names are.
        intact = set(file.keys()) == set(expected) and all(
            tensor.shape == (found := file.get_tensor(name)).shape
            and tensor.dtype == found.dtype
            and torch.equal(_bytes_of(tensor), _bytes_of(found))
            for name, tensor in expected.items()
        )
    if not intact:
        raise RunFailed(f"{path} does not read back as it was written: check the disk")


def _check_named(run_dir: Path, which: str) -> Path:
    folder = Path(which) if Path(which).is_dir() else run_dir / "checkpoints" / which
    if folder.resolve() not in [known.resolve() for known in list_checkpoints(run_dir)]:
        raise UsageError(
            f"--resume_from_checkpoint {which}: not a checkpoint in {run_dir / 'checkpoints'}; use `last`, or one of "
            f"{[known.name for known in list_checkpoints(run_dir)]}"
        )
    damage = find_damage(folder)
    if damage is not None:
        raise UsageError(f"--resume_from_checkpoint {which}: {damage}; `last` takes the newest intact checkpoint")
    return folder


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes, whatever the device; one tensor at a time is copied to the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(_bytes_of(tensors[name].contiguous()).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{folder} is not a checkpoint of this program: {error}") from error


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def _describe_file(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _remove_leftovers(checkpoints: Path) -> None:
    for unfinished in checkpoints.glob(f"step_*{UNFINISHED}"):
        shutil.rmtree(unfinished)
