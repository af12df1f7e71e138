"""What a resume costs: time to the first update from the start, from step 10, and from 90 % of an epoch.

    python benchmarks/resume_cost.py [--utterances 1000000] [--repetitions 6]

A prepared set with that many utterances is made (synthetic_corpus.py), of real lengths and no sound.
The program is imported once and forked for every start; the clock runs from the fork to the end of the first update, so
it covers the checks of the data, the preflight (from its cache) and a tiny model. Starts of the three kinds take turns,
and each figure is the least of the repetitions; what lies before the checkpoint is the same work in all three, and on a
busy machine varies by more than they differ. Beside them stands what it would cost to skip: loading and dropping
updates at the rate of the same loader, or a walk over the order of the epoch alone, as Accelerate's skip_first_batches
takes it where a set can be indexed.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(1, str(REPOSITORY / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

import yaml
from conftest import TINY_MODEL
from synthetic_corpus import write_set

import checkpoint
import train
from data import training_loader
from errors import exit_status

DEV_UTTERANCES = 100
UTTERANCES_PER_UPDATE = 8
SHALLOW_STEP, DEEP_SHARE = 10, 0.9
UPDATES_SKIPPED = 2_000


@dataclass(frozen=True)
class Start:
    """Seconds from the fork to the end of the first update, and in its parts."""

    wall: float
    cpu: float
    """Of the training process, which other work on the machine does not lengthen."""
    checkpoint: float
    """Reading, verifying and putting in place."""
    first_update: float
    """From the loop's beginning: the order of the epoch, the loader, the update."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_set(folder / "data", {"train": arguments.utterances, "dev": DEV_UTTERANCES})
        updates_per_epoch = -(-arguments.utterances // UTTERANCES_PER_UPDATE)
        recipe = write_recipe(folder, updates_per_epoch)
        deep_step = int(DEEP_SHARE * updates_per_epoch)
        runs = {"fresh start": None, f"resume at step {SHALLOW_STEP:,}": folder / "shallow"}
        runs[f"resume at step {deep_step:,}"] = folder / "deep"
        make_checkpoints(recipe, folder / "shallow", folder / "deep", deep_step)
        starts: dict[str, list[Start]] = {name: [] for name in runs}
        for repetition in range(arguments.repetitions):
            # Whoever comes first finds the machine colder.
            turn = repetition % len(runs)
            for name, run_dir in [*list(runs.items())[turn:], *list(runs.items())[:turn]]:
                starts[name].append(start(recipe, run_dir or folder / f"fresh_{repetition}", run_dir is not None))
        print_table(starts)
        print_skipping(recipe, folder / "skipping", deep_step)


def print_table(starts: dict[str, list[Start]]) -> None:
    """A line for each kind of start, and how they compare."""
    print(f"{'seconds':<28}{'to the first update':>20}{'of CPU':>9}{'checkpoint':>12}{'first update':>14}")
    best = {name: Start(*map(min, zip(*map(astuple, found), strict=True))) for name, found in starts.items()}
    for name, one in best.items():
        print(f"{name:<28}{one.wall:>20.2f}{one.cpu:>9.2f}{one.checkpoint:>12.3f}{one.first_update:>14.3f}")
    fresh, shallow, deep = best.values()
    fresh_own, shallow_own, deep_own = (one.checkpoint + one.first_update for one in best.values())
    print(
        f"deep / shallow resume: {deep_own / shallow_own:.2f} in checkpoint and first update, "
        f"{deep.wall / shallow.wall:.2f} in all\n"
        f"a deep resume beyond a fresh start: {deep_own - fresh_own:+.3f} s in checkpoint and first update, "
        f"{deep.wall - fresh.wall:+.2f} s in all"
    )


def print_skipping(recipe: Path, run_dir: Path, deep_step: int) -> None:
    """What it would cost to come to the same place by going through what was trained on already."""
    loading, walking = in_a_fork(lambda send: send_skipping_times(recipe, run_dir, deep_step, send))
    each = loading / UPDATES_SKIPPED
    print(
        f"the {deep_step:,} updates before it: {each * deep_step:,.0f} s to load and drop them ({each * 1000:.2f} ms "
        f"each, measured over {UPDATES_SKIPPED:,}), {walking:.2f} s to walk over them in the order"
    )


def write_recipe(folder: Path, updates_per_epoch: int) -> Path:
    """One epoch of the tiny model, saved at the shallow step."""
    recipe = folder / "recipe.yaml"
    settings = {
        "data_dir": str(folder / "data"), "model_config": TINY_MODEL, "vocabulary": "large_960h",
        "per_device_train_batch_size": UTTERANCES_PER_UPDATE,
        "max_steps": updates_per_epoch, "eval_steps": updates_per_epoch, "logging_steps": updates_per_epoch,
        "save_steps": SHALLOW_STEP,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def make_checkpoints(recipe: Path, shallow: Path, deep: Path, deep_step: int) -> None:
    """A run that ends at its first checkpoint, and the same as if it had come to `deep_step`."""

    def run(send: Callable[[object], None]) -> None:
        save = train.Run.save_checkpoint

        def save_and_end(run: train.Run) -> None:
            save(run)
            send(True)

        train.Run.save_checkpoint = save_and_end
        command(recipe, shallow)

    in_a_fork(run)
    shutil.copytree(shallow, deep)
    tensors, state = checkpoint.load_checkpoint(checkpoint.find_checkpoint(shallow, "last"))
    state["run"] |= {"step": deep_step, "finished_step": deep_step}
    checkpoint.save_checkpoint(deep, deep_step, tensors, state)


def start(recipe: Path, run_dir: Path, is_resumed: bool) -> Start:
    """Start train.py and measure it until its first update is done."""

    def run(send: Callable[[object], None]) -> None:
        seconds: dict[str, float] = {"checkpoint": 0.0}
        for name in ("_read_checkpoint", "_resume"):
            add_up(name, seconds)
        loop, step = train.train, train.train_step

        def timed_loop(run: train.Run) -> None:
            seconds["loop"] = time.monotonic()
            loop(run)

        def first_step(*arguments: object) -> None:
            step(*arguments)
            now = time.monotonic()
            send([now, time.process_time(), seconds["checkpoint"], now - seconds["loop"]])

        train.train, train.train_step = timed_loop, first_step
        command(recipe, run_dir, *(["--resume_from_checkpoint", "last"] if is_resumed else []))

    began_at = time.monotonic()
    ended_at, *parts = in_a_fork(run)
    return Start(ended_at - began_at, *parts)


def add_up(name: str, seconds: dict[str, float]) -> None:
    """Let a method of the run count the seconds it takes."""
    original = getattr(train.Run, name)

    def timed(run: train.Run) -> None:
        began_at = time.monotonic()
        original(run)
        seconds["checkpoint"] += time.monotonic() - began_at

    setattr(train.Run, name, timed)


def send_skipping_times(recipe: Path, run_dir: Path, deep_step: int, send: Callable[[object], None]) -> None:
    """Seconds to load UPDATES_SKIPPED updates, and to walk over all of them without loading, in place of the loop."""

    def skip(run: train.Run) -> None:
        loader = training_loader(
            run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, UPDATES_SKIPPED, num_workers=1
        )
        times = []
        for updates in (loader, run.plan.updates(0, deep_step)):
            began_at = time.monotonic()
            for _ in updates:
                pass
            times.append(time.monotonic() - began_at)
        send(times)

    train.train = skip
    command(recipe, run_dir)


def command(recipe: Path, run_dir: Path, *flags: str) -> None:
    """train.py with these arguments; it is ended from within."""
    sys.argv = ["train.py", "--config", str(recipe), "--output_dir", str(run_dir), *flags]
    sys.exit(exit_status(train.main))


def in_a_fork(work: Callable[[Callable[[object], None]], None]) -> object:
    """What `work` sends, which ends the process that it runs in."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        def send(value: object) -> None:
            os.write(sender, json.dumps(value).encode())
            os.killpg(0, 9)

        os.setpgid(0, 0)
        try:
            work(send)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


if __name__ == "__main__":
    main()
