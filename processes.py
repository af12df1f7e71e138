"""How the processes of a run start, share gradients and end; what Accelerate's launcher decided is checked here."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs
from torch import nn

from audio import usable_cores
from errors import RunFailed, UsageError
from hosts import talk_over_reachable_interface
from sharding import asks_for_sharding, check_sharding_settings

Value = TypeVar("Value")
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
SHARDED = (DistributedType.FSDP, DistributedType.MULTI_CPU)
# Gradients travel in pieces of this many numbers (100 MB in fp32), which bounds the memory of the transport.
NUMBERS_PER_REDUCTION = 25_000_000
# More loading processes than this only hold memory.
MAX_LOADING_PROCESSES = 4


def start_processes(
    report_to: list[str], output_dir: str, ddp_timeout: int = 1800, may_shard: bool = False
) -> Accelerator:
    """The Accelerator of this run, with the launcher's settings checked.

    Args:
        report_to: trackers.
        output_dir: where they write.
        ddp_timeout: seconds to wait for a process that does not answer.
        may_shard: the command can divide its model among the processes (FSDP).

    Raises:
        UsageError: for settings that would be ignored, run slowly in silence, or let processes overwrite each other.
        RunFailed: the processes do not reach each other.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UsageError(
            f"the launcher sets gradient accumulation to {accumulation}; it belongs to the run: "
            f"write --gradient_accumulation_steps {accumulation} behind train.py instead"
        )
    missing = [name for name in report_to if name not in available_trackers()]
    if missing:
        raise UsageError(f"--report_to {missing[0]} needs a package that is not installed: pip install {missing[0]}")
    has_gpu = torch.cuda.is_available()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise UsageError(
            f"mixed precision {precision} is not supported: launch with --mixed_precision no, fp16 or bf16"
        )
    if precision == "fp16" and not has_gpu:
        raise UsageError(
            "mixed precision fp16 needs a GPU and none is visible: launch with --mixed_precision bf16 or no"
        )
    if asks_for_sharding():
        if not may_shard:
            raise UsageError("the launcher asks for FSDP, which only training needs: launch this with --multi_gpu")
        check_sharding_settings(precision)
    if not has_gpu:
        _use_all_cores()
    # Without a GPU several processes talk over gloo instead of each believing that it is alone.
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))
    talk_over_reachable_interface()
    with naming_unreachable_processes():
        accelerator = Accelerator(
            cpu=not has_gpu, log_with=report_to or None, project_dir=output_dir, kwargs_handlers=[timeout]
        )
    if asks_for_sharding() and accelerator.num_processes == 1:
        raise UsageError("the launcher asks for FSDP and one process: launch with --num_processes 2, or without FSDP")
    if accelerator.distributed_type not in (SHARDED if asks_for_sharding() else SUPPORTED):
        raise UsageError(
            f"the launcher asks for {accelerator.distributed_type.value}, which this loop does not do: choose "
            "multi-GPU without DeepSpeed or Megatron in accelerate config, or launch with --multi_gpu"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UsageError("the launcher asks for torch.compile, which this loop does not use: --dynamo_backend no")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world_size:
        raise UsageError(
            f"the launcher started {world_size} processes, and this one sees {accelerator.num_processes}: "
            "launch with --multi_gpu --num_processes N, or with --num_processes 1"
        )
    return accelerator


def available_trackers() -> list[str]:
    """Trackers whose package is installed; Accelerate leaves out the others without a word."""
    return [str(getattr(name, "value", name)) for name in get_available_trackers()]


def check_same_on_all_ranks(accelerator: Accelerator, model: nn.Module) -> None:
    """Every process must begin with the same weights, since only gradients are shared.

    Raises:
        UsageError: the ranks loaded different ones (another copy of the checkpoint on another host).
    """
    if accelerator.num_processes == 1:
        return
    sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()]).sum()
    of_ranks = accelerator.gather(sums.reshape(1))
    # Devices of another make may add up in another order.
    if not torch.allclose(of_ranks, of_ranks[0], rtol=1e-9):
        raise UsageError("the processes loaded different weights: give every host the same --model_name_or_path")


def describe_processes(accelerator: Accelerator) -> dict[str, object]:
    """What the launcher decided, for config.yaml, environment.json and the screen."""
    return {
        "mixed_precision": str(accelerator.mixed_precision),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "distributed_type": "FSDP" if asks_for_sharding() else str(accelerator.distributed_type.value),
    }


@contextlib.contextmanager
def main_first(accelerator: Accelerator) -> Iterator[None]:
    """The block on the first process of each host, then on the others; also when it fails there."""
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()


class RankStatus:
    """Lets the ranks agree on how an attempt went, host to host: no rank waits for its GPU."""

    def __init__(self, accelerator: Accelerator, ddp_timeout: int) -> None:
        """Must be made on every rank at the same time.

        Raises:
            RunFailed: the processes do not reach each other.
        """
        self._num_processes = accelerator.num_processes
        self._group = None
        if self._num_processes > 1:
            with naming_unreachable_processes():
                timeout = timedelta(seconds=ddp_timeout)
                self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def worst(self, *statuses: int) -> list[int]:
        """The largest of all ranks, for each status. A rank that has ended makes the others fail at once.

        Raises:
            RunFailed: another rank is gone, or has not answered within --ddp_timeout.
        """
        if self._group is None:
            return list(statuses)
        largest = torch.tensor(statuses)
        with naming_lost_processes():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._group)
        return largest.tolist()

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, by rank.

        Raises:
            RunFailed: as `worst`.
        """
        if self._group is None:
            return [value]
        values: list = [None] * self._num_processes
        with naming_lost_processes():
            torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def decide_first(self, is_first: bool, decide: Callable[[], Value]) -> Value:
        """What the first rank decides: other hosts may not see at once what has changed on shared storage.

        Raises:
            UsageError: it refuses; every rank does, with the same message.
            RunFailed: as `worst`.
        """
        decision: list = [None, None]
        if is_first:
            try:
                decision[0] = decide()
            except UsageError as error:
                if self._group is None:
                    raise
                decision[1] = str(error)
        if self._group is not None:
            with naming_lost_processes():
                torch.distributed.broadcast_object_list(decision, src=0, group=self._group)
        if decision[1] is not None:
            raise UsageError(decision[1])
        return decision[0]

    def by_first(self, is_first: bool, work: Callable[[], None]) -> None:
        """Done by the first rank while the others wait for it.

        Raises:
            RunFailed, UsageError: it failed there; every rank ends.
        """
        failure = None
        if is_first:
            try:
                work()
            except (RunFailed, UsageError) as error:
                failure = error
        if self.worst(int(failure is not None)) != [0]:
            raise failure or RunFailed("the first process of the run has failed; its own message says why")


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone or silent."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the failure of an exchange between processes into one line.

    Raises:
        RunFailed: another process is gone, or has not answered within --ddp_timeout.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunFailed) or not is_lost_process(error):
            raise
        raise RunFailed(
            f"another process of the run {describe_loss(error)}; its own message says why, if its host could say it"
        ) from error


@contextlib.contextmanager
def naming_unreachable_processes() -> Iterator[None]:
    """The same where the processes meet.

    Raises:
        RunFailed: they do not reach each other.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise RunFailed(
            f"the processes of the run do not reach each other ({_first_line(error)}): start the launcher on every "
            "host, with the same --main_process_ip and port, and let the hosts connect to each other on any port; "
            "where they have several networks name one, export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        ) from error


def describe_loss(error: RuntimeError) -> str:
    """What a failed exchange says about the other process."""
    reason = _first_line(error)
    if "timed out" in reason.lower():
        return f"has not answered within --ddp_timeout ({reason})"
    return f"has ended ({reason})"


class SharedGradients:
    """The gradients of all trained parameters in one buffer, summed over the processes once per update.

    Every rank runs its micro-batches on its own and reduces behind the last one: a rank with an empty cut, a dropped
    layer or an unused parameter contributes zeros, and no rank can wait inside a backward pass for one that failed.

    Attributes:
        parameters: what is trained.
        buffer: all gradients, flat; each `parameter.grad` is a view of it.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        assert len({parameter.dtype for parameter in parameters}) == 1, "master weights are fp32"
        # The last number is the update's loss, which travels along so that every rank knows whether it is finite.
        self._packed = torch.zeros(
            sum(parameter.numel() for parameter in parameters) + 1,
            dtype=parameters[0].dtype,
            device=parameters[0].device,
        )
        self.buffer = self._packed[:-1]
        self._views, start = {}, 0
        for parameter in parameters:
            self._views[parameter] = self.buffer[start : start + parameter.numel()].view_as(parameter)
            parameter.grad = self._views[parameter]
            start += parameter.numel()

    def freeze(self, is_frozen: Callable[[nn.Parameter], bool]) -> None:
        """Which of the parameters stand still from now on: without a gradient the optimizer passes them over.

        Their gradients are computed no more, which saves the time of it; the moments stay as they are.
        """
        for parameter, view in self._views.items():
            parameter.requires_grad_(not is_frozen(parameter))
            parameter.grad = view if parameter.requires_grad else None

    def zero(self) -> None:
        """Forget the last update."""
        self._packed.zero_()

    def sum_over_processes(self, accelerator: Accelerator, loss: torch.Tensor) -> torch.Tensor:
        """Add the gradients and losses of all ranks; afterwards every rank holds the same. Returns the summed loss.

        A loss that is not finite makes the gradients NaN, should they not be: such an update teaches nothing.
        """
        self._packed[-1] = loss
        if accelerator.num_processes > 1:
            for piece in self._packed.split(NUMBERS_PER_REDUCTION):
                torch.distributed.all_reduce(piece)
        loss = self._packed[-1].clone()
        next(parameter for parameter in self.parameters if parameter.grad is not None).grad.add_(0.0 * loss)
        return loss

    def clip(self, accelerator: Accelerator, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to this norm; the norm that they had."""
        return accelerator.clip_grad_norm_(self.parameters, max_norm)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def choose_loading_processes(asked: int, device: torch.device) -> int:
    """Loading processes of one rank: those asked for, or for -1 as many as help.

    One pads some 100 hours of audio per minute of its core, so without a GPU, whose work the cores do, one it is; with
    a GPU a rank's share of the cores but one, and at most MAX_LOADING_PROCESSES.
    """
    if asked != -1:
        return asked
    if device.type == "cpu":
        return 1
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 1), MAX_LOADING_PROCESSES)


def _use_all_cores() -> None:
    """Undo the launcher's OMP_NUM_THREADS=1, which it sets for GPU runs and which halves the speed of two cores."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
