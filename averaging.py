"""Two means of weights: the moving average along a run (--ema_decay), and that of its best evaluations
(--average_best), whose weights lie in RUN/average/.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import checkpoint
from atomic import appearing, check_free_space, sync_folder
from errors import RunFailed, UsageError
from sharding import like

AVERAGE_FOLDER = "average"
# In it, model/ as the best single evaluation wrote it, where the average of several took its place.
SINGLE_FOLDER = "best_single"
# Of a checkpoint's tensors.
EMA_PREFIX, EMA_UPDATES = "ema/", "ema.num_updates"


class MovingAverage:
    """Exponential moving average of the trained weights, in their own precision (fp32), on their device.

    average += (1 - d) * (weights - average) behind each update that changed the weights, with d = min(decay,
    (1 + t) / (10 + t)) behind t of them: the first weights, which are worst, are forgotten first. As `num_updates` of
    TensorFlow's tf.train.ExponentialMovingAverage (https://www.tensorflow.org/api_docs/python/tf/train/
    ExponentialMovingAverage).

    Every process computes the same from the same weights, or from its piece of divided ones: nothing is exchanged.

    Attributes:
        tensors: the average by the names of the parameters; pieces, where the model is divided.
        num_updates: int64 scalar, updates that it has followed.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights of `model` as they are."""
        self.decay = decay
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.tensors = {name: value.detach().clone() for name, value in self._parameters.items()}
        device = next(iter(self._parameters.values())).device
        self.num_updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, has_stepped: torch.Tensor) -> None:
        """Follow an update; where `has_stepped` (bool scalar on the device) is False nothing changes.

        The device is not waited for.
        """
        seen = self.num_updates.double()
        decay = ((1 + seen) / (10 + seen)).clamp(max=self.decay)
        weight = torch.where(has_stepped, 1 - decay, 0.0)
        for name, average in self.tensors.items():
            average, parameter = _local(average), _local(self._parameters[name].detach())
            average.lerp_(parameter, weight.to(average.dtype))
        self.num_updates += has_stepped

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights while the block runs, and its own again afterwards, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            average, parameter = _local(average), _local(self._parameters[name].detach())
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """What a checkpoint holds, whole tensors among others; False where it holds no average: it begins here."""
        if EMA_UPDATES not in tensors:
            for name, average in self.tensors.items():
                _local(average).copy_(_local(self._parameters[name].detach()))
            return False
        for name, average in self.tensors.items():
            _local(average).copy_(_local(like(tensors[EMA_PREFIX + name], average)))
        self.num_updates.copy_(tensors[EMA_UPDATES])
        return True


def rank_evaluation(ranked: Sequence[Sequence[float]], step: int, value: float, keep: int) -> list[list[float]]:
    """The best evaluations with a new one among them.

    Args:
        ranked: [step, value of the metric] of each, best first.
        step: of the new one, behind all of them.
        value: lower is better.
        keep: how many there may be; of equal ones the earlier.
    """
    return sorted([*map(list, ranked), [step, value]], key=lambda one: (one[1], one[0]))[:keep]


def weights_file(run_dir: Path, step: int) -> Path:
    """The weights of the evaluation at `step`."""
    return run_dir / AVERAGE_FOLDER / f"step_{step:06d}.safetensors"


def write_weights(run_dir: Path, step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Write and read back one file; it is whole or absent.

    Raises:
        RunFailed: disk full, not writable, or what was written does not read back.
    """
    path = weights_file(run_dir, step)
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    num_bytes = sum(tensor.nbytes for tensor in packed.values())
    with appearing(path, num_bytes) as unfinished:
        path.parent.mkdir(exist_ok=True)
        check_free_space(path.parent, num_bytes)
        save_file(packed, unfinished)
        checkpoint.check_tensors(unfinished, packed)


def remove_unused(run_dir: Path, own_steps: Collection[int]) -> None:
    """Delete the weights that neither this run (`own_steps`) nor a resume from one of its checkpoints averages."""
    needed = {*own_steps, *(step for folder in checkpoint.list_checkpoints(run_dir) for step in _steps_of(folder))}
    kept = {weights_file(run_dir, step) for step in needed}
    for path in (run_dir / AVERAGE_FOLDER).glob("step_*"):
        if path not in kept:
            path.unlink()


def check_present(run_dir: Path, steps: Sequence[int]) -> None:
    """The weights that a checkpoint counts on are there.

    Raises:
        UsageError: one is missing.
    """
    for step in steps:
        if not weights_file(run_dir, step).is_file():
            raise UsageError(
                f"{weights_file(run_dir, step)}, which --average_best counts on, is gone: put it back, or resume "
                "without --average_best and with --resume_anyway"
            )


def mean_of(run_dir: Path, steps: Sequence[int]) -> dict[str, torch.Tensor]:
    """The mean of the weights of these evaluations: summed in float64, a tensor at a time, so equal ones stay equal.

    Raises:
        RunFailed: a file is gone or cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(weights_file(run_dir, step), framework="pt")) for step in sorted(steps)
            ]
            return {name: _mean([file.get_tensor(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"the best weights in {run_dir / AVERAGE_FOLDER} cannot be averaged: {error}") from error


def put_average(run_dir: Path) -> None:
    """Make way in model/ for the average: the best single model steps aside into average/."""
    single = run_dir / AVERAGE_FOLDER / SINGLE_FOLDER
    shutil.rmtree(single, ignore_errors=True)
    (run_dir / "model").rename(single)
    sync_folder(single.parent)


def put_single_back(run_dir: Path) -> None:
    """model/ as it was before an average took its place, if one did: a resumed run decides again."""
    single = run_dir / AVERAGE_FOLDER / SINGLE_FOLDER
    if single.exists():
        shutil.rmtree(run_dir / "model", ignore_errors=True)
        single.rename(run_dir / "model")
        sync_folder(run_dir)


def _steps_of(folder: Path) -> list[int]:
    """Of the evaluations that a checkpoint counts on; a damaged one counts on none, since nothing resumes from it."""
    try:
        return [int(step) for step, _ in checkpoint.load_state(folder)["run"]["best_evaluations"]]
    except (OSError, UsageError, KeyError, TypeError, ValueError):
        return []


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
