"""Kill train.py at random moments, start it again until it is done, and compare with a run that was never killed.

    python benchmarks/kill_resume.py [--kills 100] [--processes 2] [--seed 0]

Half of the kills come at a moment drawn uniformly from the wall time of an undisturbed run, half at a failpoint: in the
middle of an accumulation window, an optimizer step, an evaluation, a row of the log, the plot, the best model, a
checkpoint, the swap of one for a damaged one, retention, a resume, the test set or the results. A failpoint that a run
did not reach is armed again, at its first call, until it is hit.

All processes of an attempt, the loading ones too, die at once, as when the machine goes down; with several ranks the
failpoint is the main one's, or a drawn one's where all pass it. The program is imported once and forked for every rank.
The corpus is the spoken digits of CTC_CORPORA where they are, else made-up clips.

Compared bit for bit, with as many processes: weights, moments and model/; all columns of the log but times and memory;
evaluation samples; results. Every utterance of every epoch must have been trained on exactly once.
"""

import argparse
import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(1, str(REPOSITORY / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml
from safetensors.torch import load_file
from torch.optim import adam

import atomic
import best_model
import checkpoint
import roundtrip
import runlog
import scoring
import train
from clock import PHASE_COLUMNS
from config import PrepareConfig
from errors import exit_status
from prepare import prepare

CORPORA = Path(os.environ.get("CTC_CORPORA", REPOSITORY.parent / "shared" / "corpora"))
MEASURED_COLUMNS = (
    *("samples_per_second", "audio_seconds_per_second", "eval_runtime", "peak_memory_mb", "elapsed_seconds"),
    *PHASE_COLUMNS,
)
MEASURED_RESULTS = (
    *("train_runtime", "train_samples_per_second", "train_steps_per_second", "audio_hours_per_hour", "elapsed_seconds"),
    *PHASE_COLUMNS,
)
MAX_CALLS = 6
# From so many kills on, a failpoint that was never hit is a failure.
KILLS_FOR_EVERY_PHASE = 100
RANDOM_MOMENT = "at a random moment"


@dataclass(frozen=True)
class Failpoint:
    """A function of the program, and whether its process dies before, after or half-way through one of its calls."""

    owner: object
    function: str
    when: Literal["before", "after", "half"]
    is_counted: Callable[..., bool] = lambda *_, **__: True
    """Which calls count, by their arguments."""
    max_calls: int = MAX_CALLS
    """The call is drawn up to this one."""
    on_every_rank: bool = False
    needs_checkpoints: int = 0
    """So many must be there when the attempt begins."""
    damages_newest: bool = False
    """Cut the newest checkpoint off before the attempt, which has to skip it and replaces it later."""


def is_update(run: train.Run, _: object) -> bool:
    """Of `Run.forward`: in a micro-batch of an update, not in the preflight's probes, before the run is made."""
    return run.model.training and hasattr(run, "cuts")


def is_first_of_two_groups(*_: object, weight_decay: float, found_inf: torch.Tensor, **__: object) -> bool:
    """Of the optimizer's function, called once for what decays and once for the rest, and in the setting-up too."""
    return weight_decay > 0 and not found_inf.item()


def steps_aside(_: Path, target: Path) -> bool:
    """Of `Path.rename`: the older folder makes room for the newer one."""
    return target.name.endswith(atomic.ASIDE)


FAILPOINTS = {
    "accumulation window": Failpoint(train.Run, "forward", "after", is_update, on_every_rank=True),
    "optimizer step, half done": Failpoint(adam, "adam", "after", is_first_of_two_groups, on_every_rank=True),
    "update": Failpoint(train, "train_step", "after", on_every_rank=True),
    "evaluation": Failpoint(scoring, "score_one", "after", on_every_rank=True),
    "log row, half written": Failpoint(runlog.AppendOnlyTable, "append", "half"),
    "plot": Failpoint(runlog, "draw_training_curve", "before"),
    "plot, before its rename": Failpoint(runlog, "write_atomically", "before"),
    "best model, being checked": Failpoint(roundtrip, "check_folder", "before", max_calls=1),
    "best model, before its swap": Failpoint(best_model, "replace_folder", "before", max_calls=1),
    "checkpoint, tensors written": Failpoint(checkpoint, "save_file", "after"),
    "checkpoint, before its swap": Failpoint(checkpoint, "replace_folder", "before"),
    "checkpoint, behind its swap": Failpoint(checkpoint, "replace_folder", "after"),
    "swap, damaged one aside": Failpoint(
        Path, "rename", "after", steps_aside, max_calls=1, needs_checkpoints=2, damages_newest=True
    ),
    "retention": Failpoint(checkpoint, "remove_checkpoint", "before"),
    "resume, log cut back": Failpoint(
        checkpoint, "load_checkpoint", "after", max_calls=1, on_every_rank=True, needs_checkpoints=1
    ),
    "resume, optimizer loaded": Failpoint(
        checkpoint, "restore_optimizer", "after", max_calls=1, on_every_rank=True, needs_checkpoints=1
    ),
    "test set": Failpoint(train, "evaluate_test", "before", max_calls=1, on_every_rank=True),
    "results": Failpoint(train.Run, "write_results", "before", max_calls=1),
}
UTTERANCES_PER_MICRO_STEP = 4
RECIPE = {
    "vocabulary": "train", "max_steps": 40, "logging_steps": 3, "eval_steps": 8, "save_steps": 5, "save_total_limit": 2,
    "gradient_accumulation_steps": 2, "dataloader_num_workers": 1,
    "learning_rate": 1e-3, "warmup_steps": 5, "freeze_feature_encoder": False, "max_eval_samples": 16,
    "max_train_samples": 90,
    "model_config": {
        "model_type": "wav2vec2", "conv_dim": [32, 32, 32], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 4],
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.1, "layerdrop": 0.1,
        "mask_time_prob": 0.2, "mask_time_length": 2, "mask_feature_prob": 0.1, "mask_feature_length": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """How an attempt ends: after so many seconds, or at this call of a failpoint on this rank."""

    name: str
    seconds: float | None = None
    call: int = 1
    rank: int = 0


class Plan:
    """Draws how attempts end, and counts what was hit."""

    def __init__(self, seed: int, wall_seconds: float, num_processes: int) -> None:
        self._draw, self._wall_seconds, self._num_processes = random.Random(seed), wall_seconds, num_processes
        self._queue = self._draw.sample(sorted(FAILPOINTS), len(FAILPOINTS))
        self._missed: set[str] = set()
        self.hits: Counter[str] = Counter()

    def next_kill(self, num_checkpoints: int) -> Kill:
        """For an attempt that begins or, where there are checkpoints, resumes."""
        if self._draw.random() < 0.5:
            return Kill(RANDOM_MOMENT, self._draw.uniform(0, self._wall_seconds))
        name = next(name for name in self._queue if num_checkpoints >= FAILPOINTS[name].needs_checkpoints)
        point = FAILPOINTS[name]
        call = 1 if name in self._missed else self._draw.randint(1, point.max_calls)
        return Kill(name, None, call, self._draw.randrange(self._num_processes) if point.on_every_rank else 0)

    def note(self, kill: Kill, is_hit: bool) -> None:
        """A failpoint that was hit goes to the end of the queue, one that was not stays for the next attempt."""
        self.hits[kill.name] += is_hit
        if kill.name in FAILPOINTS and is_hit:
            self._queue.remove(kill.name)
            self._queue.append(kill.name)
            self._missed.discard(kill.name)
        elif kill.name in FAILPOINTS:
            self._missed.add(kill.name)

    @property
    def kills(self) -> int:
        """How many there were."""
        return self.hits.total()


def main() -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_models_in_this_process()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = write_recipe(folder, arguments.processes)
        started_at = time.monotonic()
        assert attempt(recipe, folder / "whole", arguments.processes, None)
        wall_seconds = time.monotonic() - started_at
        whole = outcome(folder / "whole", arguments.processes)
        plan, runs = Plan(arguments.seed, wall_seconds, arguments.processes), 0
        while plan.kills < arguments.kills:
            runs += 1
            kill_until_done(recipe, folder / f"run_{runs}", arguments.processes, plan)
            compare(outcome(folder / f"run_{runs}", arguments.processes), whole)
            print(f"run {runs}: the same as the undisturbed one, {plan.kills} kills so far", flush=True)
    print(f"\n{plan.kills} kills survived in {runs} runs; an undisturbed run takes {wall_seconds:.1f} s")
    for name in [RANDOM_MOMENT, *FAILPOINTS]:
        print(f"{name:<30} {plan.hits[name]:>4}")
    rows, trained = len(whole["log"]), sum(len(ids) for _, ids in whole["trained"].values())
    print(
        f"compared in each run: {rows} rows of the log, {len(whole['tensors'])} tensors, {trained} utterances trained"
    )
    missing = [name for name in FAILPOINTS if not plan.hits[name]]
    print(f"never hit: {', '.join(missing)}" if missing else "every phase was hit")
    if missing and arguments.kills >= KILLS_FOR_EVERY_PHASE:
        sys.exit(1)


def kill_until_done(recipe: Path, run_dir: Path, num_processes: int, plan: Plan) -> None:
    """One run: killed and started again until it comes to its end."""
    is_done = False
    while not is_done:
        checkpoints = checkpoint.list_checkpoints(run_dir)
        kill = plan.next_kill(len(checkpoints))
        if kill.name in FAILPOINTS and FAILPOINTS[kill.name].damages_newest:
            os.truncate(checkpoints[-1] / checkpoint.TENSORS_FILE, 100)
        is_done = attempt(recipe, run_dir, num_processes, kill)
        plan.note(kill, not is_done)


def write_recipe(folder: Path, num_processes: int) -> Path:
    """The corpus, prepared, and the settings of the run; prepared in a process of its own, since this one will fork."""
    from conftest import make_rows, write_part

    data_dir = folder / "data"
    digits = CORPORA / "digits" / "manifest.csv"
    if digits.exists():
        settings = PrepareConfig(
            corpus=str(digits),
            data_dir=str(data_dir),
            split_by="utterance",
            split_fractions=[0.9, 0.05, 0.05],
            num_workers=1,
        )
        process = multiprocessing.Process(target=prepare, args=(settings,))
        process.start()
        process.join()
        assert process.exitcode == 0
    else:
        for split, count, seed in (("train", 90, 1), ("dev", 16, 2), ("test", 16, 3)):
            write_part(data_dir / split / "part_1", make_rows(count, seed=seed))
    recipe = folder / "recipe.yaml"
    size = UTTERANCES_PER_MICRO_STEP // num_processes
    recipe.write_text(yaml.safe_dump(RECIPE | {"data_dir": str(data_dir), "per_device_train_batch_size": size}))
    return recipe


def check_models_in_this_process() -> None:
    """A new process for each saved model would cost every attempt 10 s of imports."""
    import transformers.pipelines  # noqa: F401 - once, before the forks
    from conftest import check_in_this_process

    roundtrip.check_in_clean_process = check_in_this_process


def attempt(recipe: Path, run_dir: Path, num_processes: int, kill: Kill | None) -> bool:
    """Train until the end, or until SIGKILL takes all processes; whether it came to the end."""
    port, ranks = free_port(), []
    for rank in range(num_processes):
        pid = os.fork()
        if not pid:
            os.setpgid(0, ranks[0] if ranks else 0)
            run_rank(recipe, run_dir, (rank, num_processes, port), kill)
        os.setpgid(pid, ranks[0] if ranks else pid)  # Whoever comes first: the next rank needs the group.
        ranks.append(pid)
    ends_at = time.monotonic() + kill.seconds if kill and kill.seconds is not None else float("inf")
    try:
        statuses = wait_for(ranks, ends_at)
    finally:
        kill_group(ranks[0])
    assert set(statuses) <= {0, -signal.SIGKILL}, said(run_dir)
    return not any(statuses)


def wait_for(ranks: list[int], ends_at: float) -> list[int]:
    """The exit statuses of all ranks, which are killed at `ends_at`, a reading of time.monotonic()."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(ranks):
        for pid in set(ranks) - statuses.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() >= ends_at:
            kill_group(ranks[0])
        time.sleep(0.002)
    return list(statuses.values())


def kill_group(group: int) -> None:
    """All processes of an attempt at once, as when a machine goes down."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run_rank(recipe: Path, run_dir: Path, place: tuple[int, int, int], kill: Kill | None) -> None:
    """Be one process of the run, with the environment that the launcher makes; does not return."""
    rank, num_processes, port = place
    out = os.open(run_dir.with_suffix(f".{rank}.out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if num_processes > 1:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)},
        }
    if kill and kill.seconds is None and kill.rank == rank:
        arm(FAILPOINTS[kill.name], kill.call)
    record_utterances(run_dir.with_suffix(f".{rank}.ids"))
    flags = ["--config", str(recipe), "--output_dir", str(run_dir), "--resume_from_checkpoint", "auto"]
    sys.argv = ["train.py", *flags]
    status = 1
    try:
        status = exit_status(train.main)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> int:
    """Where the ranks of an attempt find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said(run_dir: Path) -> str:
    """What the ranks of the last attempt printed."""
    return "\n".join(path.read_text() for path in sorted(run_dir.parent.glob(f"{run_dir.name}.*.out")))


def arm(point: Failpoint, call: int) -> None:
    """Die by SIGKILL, with all other processes of the attempt, at this call of the failpoint's function."""
    original, calls = getattr(point.owner, point.function), itertools.count(1)

    def failing(*arguments: object, **settings: object) -> object:
        is_due = point.is_counted(*arguments, **settings) and next(calls) == call
        if is_due and point.when == "half":
            write_half_a_row(*arguments)
        if is_due and point.when != "after":
            kill_group(0)
        result = original(*arguments, **settings)
        if is_due:
            kill_group(0)
        return result

    setattr(point.owner, point.function, failing)


def write_half_a_row(table: runlog.AppendOnlyTable, *rows: dict[str, object]) -> None:
    """As far as a kill lets it come."""
    data = table._format(rows)
    with table.path.open("ab") as file:
        file.write(data[: len(data) // 2])


def record_utterances(path: Path) -> None:
    """Append a line of step and ids for each update that was done."""
    original: Callable = train.train_step

    def recording(run: train.Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        result = original(run, update)
        ids = [name for batch in update.micro_batches for name in batch.ids]
        with path.open("a") as file:
            file.write(json.dumps([update.step, update.epoch, ids]) + "\n")
        return result

    train.train_step = recording


def outcome(run_dir: Path, num_processes: int) -> dict[str, object]:
    """All of a finished run that must not depend on kills."""
    with (run_dir / "training_log.csv").open(newline="") as file:
        log = [{k: v for k, v in row.items() if k not in MEASURED_COLUMNS} for row in csv.DictReader(file)]
    results = json.loads((run_dir / "train_results.json").read_text())
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    assert checkpoint.find_damage(newest) is None
    updates = trained_utterances(run_dir, num_processes)
    epochs: dict[int, list[str]] = {}
    for epoch, ids in updates.values():
        epochs.setdefault(epoch, []).extend(ids)
    assert all(len(ids) == len(set(ids)) for ids in epochs.values()), "an utterance was seen twice in an epoch"
    complete = [len(ids) for ids in epochs.values()][:-1]
    assert set(complete) == {RECIPE["max_train_samples"]}, f"epochs of {complete} utterances"
    return {
        "log": log,
        "samples": (run_dir / "eval_samples.csv").read_bytes(),
        "slices": (run_dir / "eval_slices.csv").read_bytes(),
        "results": {name: value for name, value in results.items() if name not in MEASURED_RESULTS},
        "tensors": load_file(newest / checkpoint.TENSORS_FILE),
        "model": load_file(run_dir / "model" / "model.safetensors"),
        "trained": updates,
    }


def trained_utterances(run_dir: Path, num_processes: int) -> dict[int, tuple[int, list[str]]]:
    """Epoch and sorted ids of each update; of one that was done again after a kill, the last time counts."""
    updates: dict[int, tuple[int, list[str]]] = {}
    for rank in range(num_processes):
        lines = map(json.loads, run_dir.with_suffix(f".{rank}.ids").read_text().splitlines())
        for step, (epoch, ids) in {step: (epoch, ids) for step, epoch, ids in lines}.items():
            updates[step] = (epoch, sorted([*updates.get(step, (epoch, []))[1], *ids]))
    return updates


def compare(found: dict[str, object], whole: dict[str, object]) -> None:
    """Fail at the first difference."""
    for name in ("log", "samples", "slices", "results", "trained"):
        assert found[name] == whole[name], name
    for name in ("tensors", "model"):
        assert found[name].keys() == whole[name].keys()
        assert all(torch.equal(found[name][key], whole[name][key]) for key in whole[name]), name


if __name__ == "__main__":
    main()
