"""train.py against transformers' Trainer as its CTC example script sets it up (trainer_run.py).

    python benchmarks/vs_trainer.py [--size demo] [--precision fp32] [--repetitions 2] [--clips 192] [--batch_size 8]

Same checkpoint (random weights; dropout and masks off, feature encoder frozen), same prepared clips of noise with
Common Voice's distribution of lengths, same utterances per update, a process for each run, in turn. `as shipped` draws
batches at random, `grouped` is `--train_sampling_strategy group_by_length`. Speed is seconds of audio per second over
the second epoch; memory the anonymous one of the process and its children; the first update counts from the start of
the process, imports, checks and all (but of what train.py evaluates before its first update, which the Trainer does
not, only four clips), and the resume is one behind three quarters of an epoch. Loss curves: both in the order of
train.py, with its loss, on a model with layer norm (with group norm, padding changes what transformers computes), as
the largest relative difference of the loss of an update.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

import numpy as np
from noise_clips import common_voice_seconds, write_noise
from prepare_memory import anonymous_bytes, process_tree
from step_overhead import model_config

from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from data import BatchPlan, ShardDataset
from pretrained import load_model, save_model

SYSTEMS = ("ours", "trainer as shipped", "trainer grouped")
COMPARED_UPDATES = 24
SECONDS_BETWEEN_LOOKS = 0.1


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs share."""

    folder: Path
    steps_per_epoch: int
    batch_size: int
    is_bf16: bool

    def run(
        self, system: str, name: str, steps: int, until: Callable[[], bool] | None = None, **flags: object
    ) -> float:
        """One process, to its end or until a condition holds; its peak memory in MB. Raises if it fails."""
        command = self._ours(name, steps, flags) if system == "ours" else self._theirs(system, name, steps, flags)
        precision = "bf16" if self.is_bf16 else "no"
        environment = os.environ | {"ACCELERATE_MIXED_PRECISION": precision, "HF_HUB_OFFLINE": "1"}
        with (self.folder / f"{name}.out").open("w") as output:
            process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
            peak = watch_memory(process, until)
        if process.returncode and until is None:
            raise SystemExit(f"{name} failed:\n{(self.folder / f'{name}.out').read_text()[-3000:]}")
        return peak

    def _ours(self, name: str, steps: int, flags: dict[str, object]) -> list[object]:
        settings = {
            "data_dir": self.folder / "clips", "output_dir": self.folder / name, "vocabulary": "model",
            "model_name_or_path": self.folder / "checkpoint", "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size, "max_steps": steps, "learning_rate": 1e-4,
            "eval_steps": 10**6, "save_steps": 10**6, "logging_steps": self.steps_per_epoch, "weight_decay": 0.0,
            "do_predict": "false", "preflight": "warn", **flags,
        }  # fmt: skip
        pairs = [part for key, value in settings.items() for part in (f"--{key}", value)]
        return [sys.executable, REPOSITORY / "train.py", *pairs]

    def _theirs(self, system: str, name: str, steps: int, flags: dict[str, object]) -> list[object]:
        settings = {
            "checkpoint": self.folder / "checkpoint", "dataset": self.folder / "dataset", "output": self.folder / name,
            "events": self.folder / f"{name}.events", "steps": steps, "batch_size": self.batch_size,
        }  # fmt: skip
        pairs = [part for key, value in (settings | flags).items() for part in (f"--{key}", value)]
        switches = ["--grouped"] * (system == "trainer grouped") + ["--bf16"] * self.is_bf16
        pairs = [part for part in pairs if part is not True]
        return [sys.executable, Path(__file__).with_name("trainer_run.py"), *pairs, *switches]

    def events(self, name: str) -> list[dict[str, float]]:
        """What a Trainer's run has written so far."""
        path = self.folder / f"{name}.events"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, name: str) -> list[dict[str, float]]:
        """Rows of our training log so far; empty cells left out."""
        path = self.folder / name / "training_log.csv"
        if not path.exists():
            return []
        with path.open() as file:
            rows = list(csv.DictReader(file))
        return [{key: _number(value) for key, value in row.items() if value} for row in rows]


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", "base"], default="demo")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(
            folder, arguments.clips // arguments.batch_size, arguments.batch_size, arguments.precision == "bf16"
        )
        sizes = {"train": arguments.clips, "dev": arguments.clips // 2}
        write_noise(folder / "clips", {split: common_voice_seconds(size) for split, size in sizes.items()})
        make_checkpoint(folder / "checkpoint", model_config(arguments.size))
        convert(folder)
        print(
            f"{arguments.size}, {arguments.precision}, {arguments.clips} clips, batch {arguments.batch_size}",
            flush=True,
        )
        print_table({system: measure(bench, system, arguments.repetitions) for system in SYSTEMS})
        print(f"loss of {COMPARED_UPDATES} updates in the same order: largest relative difference "
              f"{compare_losses(bench, arguments.size):.1e}", flush=True)  # fmt: skip


def measure(bench: Bench, system: str, repetitions: int) -> dict[str, float]:
    """Means over the repetitions."""
    found = [{**speed(bench, system, n), **first_update(bench, system, n)} for n in range(repetitions)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def speed(bench: Bench, system: str, repetition: int) -> dict[str, float]:
    """Audio per second and padding of the second epoch, peak memory, seconds of an evaluation."""
    name, epoch = f"{system.replace(' ', '_')}_{repetition}", bench.steps_per_epoch
    peak = bench.run(system, name, 2 * epoch)
    if system == "ours":
        rows = bench.log(name)
        second = next(row for row in rows if row["step"] == 2 * epoch)
        evaluation = second["eval_runtime"]
        seconds = sum(second[f"{phase}_seconds"] for phase in ("data", "compute", "communication"))
        samples, padding = second["audio_seconds_per_second"] * seconds, second["padding_fraction"]
    else:
        events = bench.events(name)
        first, second = (next(one for one in events if one.get("step") == step) for step in (epoch, 2 * epoch))
        seconds = second["time"] - first["time"]
        samples = (second["samples"] - first["samples"]) / SAMPLE_RATE_HZ
        padding = 1 - (second["samples"] - first["samples"]) / (second["padded_samples"] - first["padded_samples"])
        evaluation = next(one["evaluation"] for one in events if "evaluation" in one)
    return {"audio s/s": samples / seconds, "padding": padding, "peak MB": peak, "evaluation s": evaluation}


def first_update(bench: Bench, system: str, repetition: int) -> dict[str, float]:
    """Seconds from the start of a process to its first update: of a fresh run and of a resumed one."""
    name, stop = f"{system.replace(' ', '_')}_start_{repetition}", bench.steps_per_epoch * 3 // 4
    flags = (
        {"logging_steps": 1, "max_eval_samples": 4, "save_steps": stop} if system == "ours" else {"save_steps": stop}
    )
    steps_done = bench.log if system == "ours" else bench.events

    def last_step() -> float:
        return max((row["step"] for row in steps_done(name) if "step" in row), default=0)

    def has_saved() -> bool:
        where = "checkpoints/step_*/manifest.json" if system == "ours" else "checkpoint-*/trainer_state.json"
        return bool(list((bench.folder / name).glob(where))) and last_step() > stop

    seconds = []
    started_at = time.time()
    bench.run(system, name, 10**4, until=_noting(lambda: last_step() >= 1, has_saved, seconds, started_at), **flags)
    resume = {"resume_from_checkpoint": "last"} if system == "ours" else {"resume": True}
    (bench.folder / f"{name}.events").unlink(missing_ok=True)
    log = bench.folder / name / "training_log.csv"
    written_at = log.stat().st_mtime if log.exists() else None

    def goes_on() -> bool:
        # Our log still holds what came behind the checkpoint, until it is cut back.
        return (written_at is None or log.stat().st_mtime != written_at) and last_step() > stop

    started_at = time.time()
    bench.run(system, name, 10**4, until=_noting(goes_on, goes_on, seconds, started_at), **flags, **resume)
    return {"first update s": seconds[0], "resumed s": seconds[1]}


def _noting(
    is_first: Callable[[], bool], is_over: Callable[[], bool], seconds: list, since: float
) -> Callable[[], bool]:
    """A condition that notes once when something else has happened."""
    noted = []

    def look() -> bool:
        if not noted and is_first():
            noted.append(True)
            seconds.append(time.time() - since)
        return bool(noted) and is_over()

    return look


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def watch_memory(process: subprocess.Popen, until: Callable[[], bool] | None) -> float:
    """Wait for the end, or kill the process tree when the condition holds; the peak of its anonymous memory in MB."""
    peak = 0
    while process.poll() is None:
        if until is not None and until():
            for pid in process_tree(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            break
        peak = max(peak, sum(map(anonymous_bytes, process_tree(process.pid))))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return peak / 1e6


def make_checkpoint(folder: Path, fields: dict[str, object], **others: object) -> None:
    """Random weights with a processor, as both sides load them."""
    config = TrainConfig(data_dir="-", output_dir="-", model_config=fields | others, vocabulary="large_960h")
    save_model(load_model(config, list), folder)


def convert(folder: Path) -> None:
    """The clips as the example script's `datasets.map` stores them."""
    command = [sys.executable, Path(__file__).with_name("trainer_run.py"), "--convert"]
    for name in ("clips", "checkpoint", "dataset"):
        command += [f"--{name}", folder / name]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compare_losses(bench: Bench, size: str) -> float:
    """Largest relative difference of an update's loss, both in our order and without a decay or warm-up."""
    make_checkpoint(bench.folder / "checkpoint", model_config(size), feat_extract_norm="layer", conv_bias=True)
    steps = COMPARED_UPDATES
    dataset = ShardDataset(bench.folder / "clips" / "train")
    plan = BatchPlan(np.arange(len(dataset)), dataset.num_samples, bench.batch_size, seed=42)
    order = [int(row) for _, _, rows in plan.updates(0, steps) for row in plan.rows[rows]]
    (bench.folder / "order.json").write_text(json.dumps(order))
    bench.run("ours", "ours_losses", steps, logging_steps=1, max_eval_samples=4)
    bench.run("trainer as shipped", "trainer_losses", steps, order=bench.folder / "order.json")
    ours = {row["step"]: row["train_loss"] for row in bench.log("ours_losses") if "train_loss" in row}
    theirs = {one["loss_step"]: one["loss"] for one in bench.events("trainer_losses") if "loss" in one}
    shared = sorted(ours.keys() & theirs.keys())
    assert len(shared) == steps, f"{len(shared)} of {steps} losses"
    return max(abs(ours[step] - theirs[step]) / theirs[step] for step in shared)


def print_table(found: dict[str, dict[str, float]]) -> None:
    """A row for each system, and ours against the others."""
    names = list(next(iter(found.values())))
    print(f"{'':<22}" + "".join(f"{name:>16}" for name in names))
    for system, row in found.items():
        print(f"{system:<22}" + "".join(f"{row[name]:>16.3f}" for name in names))
    for system in SYSTEMS[1:]:
        ratios = [found["ours"][name] / max(found[system][name], 1e-9) for name in names]
        print(f"{'ours / ' + system.split()[-1]:<22}" + "".join(f"{ratio:>16.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
