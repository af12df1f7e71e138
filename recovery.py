"""Out of memory in the middle of a run: the same work again, in smaller cuts.

An update and an evaluation are the same for every cut (promises 1 and 2), so nothing is lost but time.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from audio import SAMPLE_RATE_HZ
from data import Batch
from errors import RunFailed, UsageError
from processes import naming_lost_processes

Result = TypeVar("Result")
# What Accelerate's list lacks: libraries that fail to get their workspace.
OTHER_MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")
IDS_SHOWN = 8


class MemoryLimitExceeded(RuntimeError):
    """More memory was used than --memory_limit_mb allows."""


class Cuts:
    """How large a micro-batch may be, in samples with padding; halved whenever memory runs out, and kept so.

    Attributes:
        what: names the work in messages: "update", "evaluation".
        remedy: what helps when a single clip does not fit.
        max_padded_samples: limit on rows x longest row; None until memory has run out once.
        retries: how often it has.
    """

    def __init__(self, what: str, remedy: str, report: Callable[[str], None]) -> None:
        self.what, self.remedy, self._report = what, remedy, report
        self.max_padded_samples: int | None = None
        self.retries = 0
        self._current: Batch | None = None

    def divide(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same rows in batches within the limit, in their order."""
        for batch in batches:
            for piece in [batch] if self.max_padded_samples is None else batch.split(self.max_padded_samples):
                self._current = piece
                yield piece

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """`work()`, which walks through `divide`, or None when memory ran out and it must be done again.

        Raises:
            RunFailed: a single utterance does not fit.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # Outside the handler: the error's frames, and with them the tensors that filled the memory, are gone.
        self._current, failed = None, self._current
        release_memory()
        self._shrink(failed, message)
        return None

    def _shrink(self, failed: Batch | None, message: str) -> None:
        if failed is None:
            raise RunFailed(f"out of memory in an {self.what} ({message}): lower --per_device_train_batch_size")
        rows, samples = failed.input_values_BS.shape
        ids = ", ".join(failed.ids[:IDS_SHOWN]) + (", ..." if rows > IDS_SHOWN else "")
        seconds = samples / SAMPLE_RATE_HZ
        if rows == 1:
            raise RunFailed(
                f"out of memory in an {self.what} with a single clip of {seconds:.1f} s, {ids} ({message}): "
                f"{self.remedy}"
            )
        self.retries += 1
        self.max_padded_samples = rows * samples // 2
        limit = self.max_padded_samples / SAMPLE_RATE_HZ
        self._report(
            f"out of memory in an {self.what}, with {rows} clips of up to {seconds:.1f} s ({ids}; {message}): "
            f"done again, from now on in cuts of at most {limit:.1f} s of padded audio"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether smaller batches may help: the allocators of GPU and CPU, their libraries, and --memory_limit_mb."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryLimitExceeded, MemoryError)):
        return True
    return should_reduce_batch_size(error) or any(text in str(error) for text in OTHER_MESSAGES)


def release_memory() -> None:
    """After a failure: give back what nothing holds any more, cycles included (half a second, for their search)."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give back to the GPU, and from glibc's heap to the system, what is free already."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def failing_by_name(remedy: str) -> Iterator[None]:
    """What goes wrong once the work has begun is a failed run (status 1), said by the rank that it happened to.

    Args:
        remedy: for memory that runs out elsewhere than in `Cuts`.

    Raises:
        RunFailed: for a damaged clip, a lost process, and memory that ran out.
    """
    try:
        with naming_lost_processes():
            yield
    except UsageError as error:
        # DataLoader puts the trace of its worker before the message.
        raise RunFailed(str(error).strip().splitlines()[-1].removeprefix("errors.UsageError: ")) from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunFailed) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise RunFailed(f"out of memory ({reason}): close other programs on the device, {remedy}") from error
