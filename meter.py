"""What is counted between two rows of the log, and the updates that were left out."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from audio import SAMPLE_RATE_HZ
from data import Batch, Update
from errors import RunFailed

METER_SUMS = (
    *("loss", "labels", "utterances", "samples", "padded_samples", "seconds"),
    *("scaler_skips", "bad_updates", "oom_retries"),
)
# Summed on the device, so that no step waits for them.
SUMMED_ON_DEVICE = ("loss", "labels")
# A loss scaler starts high and may need twenty skips in a row; more says that no scale will do.
MAX_SCALER_SKIPS = 40


class Meter:
    """Sums since the last row of the log. The loss stays on the device, so that no step waits for it.

    Attributes:
        names: of the sums: METER_SUMS, and those that a kind of training adds.
    """

    def __init__(
        self, accelerator: Accelerator, pending: list[float], grad_norm: float | None, more: tuple[str, ...] = ()
    ) -> None:
        self.accelerator = accelerator
        self.names = (*METER_SUMS, *more)
        on_device = [self.names.index(name) for name in (*SUMMED_ON_DEVICE, *more)]
        self._places_on_device = torch.tensor(on_device, device=accelerator.device)
        self.grad_norm = torch.tensor(float("nan") if grad_norm is None else grad_norm)
        self.note = ""
        self._started_at: float | None = None
        self._restart(pending)

    def start(self) -> None:
        """Start the clock, which runs while updates are made and not while evaluating or saving."""
        self._started_at = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, once the device has done what it was asked to."""
        if self._started_at is not None and self.accelerator.is_main_process:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            self._sums["seconds"] += time.perf_counter() - self._started_at
        self._started_at = None

    def add(
        self, update: Update, loss_sum: torch.Tensor, grad_norm: torch.Tensor, more: torch.Tensor | None = None
    ) -> None:
        """Count one update; what all ranks know alike is counted by the first.

        Args:
            update: this rank's share.
            loss_sum: of this rank; NaN on every rank where the update's loss is not finite.
            grad_norm: of the update.
            more: this rank's values of the sums that a kind of training adds; not counted where the loss is NaN.
        """
        self.grad_norm = grad_norm
        # A loss that is no number would hide all the others of its row; it is none on all ranks or on none.
        has_loss = torch.isfinite(loss_sum)
        self._on_device[0] += torch.where(has_loss, loss_sum, 0.0)
        if self.accelerator.is_main_process:
            self._on_device[1] += torch.where(has_loss, float(update.num_labels), 0.0)
            self._sums["utterances"] += update.num_utterances
        if more is not None:
            self._on_device[len(SUMMED_ON_DEVICE) :] += torch.where(has_loss, more, 0.0)
        for batch in update.micro_batches:
            self._sums["samples"] += batch.num_samples
            self._sums["padded_samples"] += batch.num_padded_samples

    def count(self, name: str, times: int = 1) -> None:
        """Count an event that this rank alone knows of."""
        self._sums[name] += times

    def reduce(self) -> dict[str, float]:
        """Pause, and return the sums over all ranks. They are kept until `clear`."""
        self.pause()
        mine = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=self.accelerator.device)
        mine[self._places_on_device] += self._on_device
        reduced = self.accelerator.reduce(mine, reduction="sum").tolist()
        # From here on the first rank holds what all have counted, as after a resume: equal bits either way.
        self._restart(reduced)
        return dict(zip(self.names, reduced, strict=True))

    def clear(self) -> None:
        """Begin the next row of the log."""
        self._restart([0.0] * len(self.names))

    def _restart(self, sums: list[float]) -> None:
        mine = sums if self.accelerator.is_main_process else [0.0] * len(self.names)
        self._sums = dict(zip(self.names, mine, strict=True))
        self._on_device = torch.zeros(len(self._places_on_device), dtype=torch.float64, device=self.accelerator.device)


@dataclass
class _Watched:
    """One update until it is known whether its gradient was finite."""

    step: int
    batches: list[tuple[Batch, torch.Tensor]]
    """This rank's micro-batches with the loss of each utterance, loss_B."""
    is_left_out: torch.Tensor
    has_loss: torch.Tensor


class BadUpdates:
    """Finds updates whose loss or gradient is not finite; they changed no weight. All ranks find the same.

    An update is looked at when the next one has been asked for: by then the device has long finished it, and no step
    waits.
    """

    def __init__(self, accelerator: Accelerator, max_bad_updates: int, meter: Meter, in_a_row: list[int]) -> None:
        self.accelerator, self.max_bad_updates, self.meter = accelerator, max_bad_updates, meter
        self._newest: _Watched | None = None
        self._bad_in_a_row, self._skips_in_a_row = in_a_row

    @property
    def in_a_row(self) -> list[int]:
        """How many of the newest updates were bad, and how many were skipped by a loss scaler."""
        return [self._bad_in_a_row, self._skips_in_a_row]

    def watch(
        self, step: int, batches: list[tuple[Batch, torch.Tensor]], grad_norm: torch.Tensor, loss: torch.Tensor,
        write: Callable[[list[dict[str, object]]], None],
    ) -> None:  # fmt: skip
        """Remember this update and judge the one before it.

        Args:
            step: optimizer steps before it.
            batches: this rank's micro-batches with their loss_B.
            grad_norm: of all ranks' gradients.
            loss: of all ranks.
            write: takes rows for bad_batches.csv; called on every rank.

        Raises:
            RunFailed: --max_bad_updates in a row.
        """
        self.judge(write)
        self._newest = _Watched(step, batches, ~torch.isfinite(grad_norm), torch.isfinite(loss))

    def judge(self, write: Callable[[list[dict[str, object]]], None]) -> None:
        """Judge the newest update now, as before a row of the log or a checkpoint."""
        newest, self._newest = self._newest, None
        if newest is None:
            return
        if not newest.is_left_out.item():
            self._bad_in_a_row = self._skips_in_a_row = 0
            return
        # With a finite loss the scale was too high, which is how a scaler finds it (trap 30).
        if self.accelerator.scaler is not None and newest.has_loss.item():
            self._skips_in_a_row += 1
            self._count("scaler_skips")
        else:
            self._bad_in_a_row += 1
            self._count("bad_updates")
            write(gather_object(_describe(newest)))
        self._check(newest.step)

    def _count(self, name: str) -> None:
        if self.accelerator.is_main_process:
            self.meter.count(name)

    def _check(self, step: int) -> None:
        what, clips = None, ""
        if self._bad_in_a_row >= self.max_bad_updates:
            what = (
                f"last {self._bad_in_a_row} updates, up to step {step + 1}, had a loss or gradient that is not finite"
            )
            clips = " (bad_batches.csv names the clips)"
        elif self._skips_in_a_row >= MAX_SCALER_SKIPS:
            what = f"loss scaler skipped the last {self._skips_in_a_row} updates, up to step {step + 1}"
        if what:
            raise RunFailed(
                f"the {what}, and none of them changed the weights{clips}: lower --learning_rate, raise "
                "--warmup_steps, or launch with another --mixed_precision; what was saved before is sound"
            )


def _describe(watched: _Watched) -> list[dict[str, object]]:
    rows = []
    for batch, loss_B in watched.batches:
        columns = (batch.ids, batch.sample_lengths_B.tolist(), batch.num_targets_B.tolist(), loss_B.tolist())
        for utterance_id, samples, labels, loss in zip(*columns, strict=True):
            seconds = samples / SAMPLE_RATE_HZ
            rows.append(
                {"step": watched.step + 1, "id": utterance_id, "seconds": seconds, "labels": labels, "loss": loss}
            )
    return rows
