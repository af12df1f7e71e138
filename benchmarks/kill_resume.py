"""Kill train.py at random moments, start it again until it is done, and compare with a run that was never killed.

    python benchmarks/kill_resume.py [--kills 100] [--seed 0]

Half of the kills come at a moment drawn uniformly from the wall time of an undisturbed run, half at a failpoint: in the
middle of an accumulation window, an evaluation, a row of the log, the plot, the best model, a checkpoint, the swap of a
folder, retention, a resume, the test set or the results. The program is imported once and forked for every attempt. The
corpus is the spoken digits of CTC_CORPORA where they are, else made-up clips.

Compared bit for bit: weights, moments and model/; all columns of the log but times and memory; evaluation samples;
results. Every utterance of every epoch must have been trained on exactly once.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(1, str(REPOSITORY / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml
from safetensors.torch import load_file

import atomic
import checkpoint
import roundtrip
import run as run_module
import runlog
import train
from config import PrepareConfig
from errors import exit_status
from prepare import prepare

CORPORA = Path(os.environ.get("CTC_CORPORA", REPOSITORY.parent / "shared" / "corpora"))
MEASURED_COLUMNS = (
    *("samples_per_second", "audio_seconds_per_second", "eval_runtime", "peak_memory_mb", "elapsed_seconds"),
    "padding_fraction",
)
MEASURED_RESULTS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
# Owner, function and whether the kill comes before or after one of its calls.
FAILPOINTS: dict[str, tuple[object, str, str]] = {
    "accumulation window": (train.Run, "forward", "after"),
    "evaluation": (train, "score_one", "after"),
    "update": (train, "train_step", "after"),
    "log row, half written": (runlog.AppendOnlyTable, "append", "half"),
    "plot": (runlog, "draw_training_curve", "before"),
    "plot, before its rename": (runlog, "write_atomically", "before"),
    "best model, being checked": (roundtrip, "check_folder", "before"),
    "best model, before its swap": (run_module, "replace_folder", "before"),
    "checkpoint, tensors written": (checkpoint, "save_file", "after"),
    "checkpoint, before its swap": (checkpoint, "replace_folder", "before"),
    "checkpoint, behind its swap": (checkpoint, "replace_folder", "after"),
    "swap, old folder aside": (atomic, "sync_folder", "before"),
    "retention": (checkpoint, "_remove_folder", "before"),
    "resume, log cut back": (checkpoint, "load_checkpoint", "after"),
    "resume, optimizer loaded": (checkpoint, "restore_optimizer", "after"),
    "test set": (train, "evaluate_test", "before"),
    "results": (train.Run, "write_results", "before"),
}
MAX_CALLS = 6
RECIPE = {
    "vocabulary": "train", "max_steps": 40, "logging_steps": 3, "eval_steps": 8, "save_steps": 5, "save_total_limit": 2,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1,
    "learning_rate": 1e-3, "warmup_steps": 5, "freeze_feature_encoder": False, "max_eval_samples": 16,
    "max_train_samples": 90,
    "model_config": {
        "model_type": "wav2vec2", "conv_dim": [32, 32, 32], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 4],
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.1, "layerdrop": 0.1,
        "mask_time_prob": 0.2, "mask_time_length": 2, "mask_feature_prob": 0.1, "mask_feature_length": 4,
    },
}  # fmt: skip


def main() -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    check_models_in_this_process()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = write_recipe(folder)
        started_at = time.monotonic()
        assert attempt(recipe, folder / "whole", None, None) == 0, (folder / "whole.out").read_text()
        wall = time.monotonic() - started_at
        whole = outcome(folder / "whole")
        kills, hits, runs = 0, Counter(), 0
        points = itertools.cycle(draw.sample(sorted(FAILPOINTS), len(FAILPOINTS)))
        while kills < arguments.kills:
            runs += 1
            run_dir, status = folder / f"run_{runs}", None
            while status != 0:
                is_timed, point = draw.random() < 0.5, None
                if not is_timed:
                    point = next(points)
                call = draw.randint(1, MAX_CALLS)
                status = attempt(recipe, run_dir, draw.uniform(0, wall) if is_timed else None, point and (point, call))
                assert status in (0, -signal.SIGKILL), run_dir.with_suffix(".out").read_text()
                if status:
                    kills += 1
                    hits["at a random moment" if is_timed else point] += 1
            compare(outcome(run_dir), whole)
            print(f"run {runs}: the same as the undisturbed one, {kills} kills so far", flush=True)
    print(f"\n{kills} kills survived in {runs} runs; an undisturbed run takes {wall:.1f} s")
    for name in ["at a random moment", *FAILPOINTS]:
        print(f"{name:<30} {hits[name]:>4}")
    rows, trained = len(whole["log"]), sum(len(ids) for _, ids in whole["trained"].values())
    print(
        f"compared in each run: {rows} rows of the log, {len(whole['tensors'])} tensors, {trained} utterances trained"
    )


def write_recipe(folder: Path) -> Path:
    """The corpus, prepared, and the settings of the run; prepared in a process of its own, since this one will fork."""
    from conftest import make_rows, write_part

    data_dir = folder / "data"
    digits = CORPORA / "digits" / "manifest.csv"
    if digits.exists():
        settings = PrepareConfig(
            corpus=str(digits), data_dir=str(data_dir), split_by="utterance", split_fractions=[0.9, 0.05], num_workers=1
        )
        process = multiprocessing.Process(target=prepare, args=(settings,))
        process.start()
        process.join()
        assert process.exitcode == 0
    else:
        for split, count, seed in (("train", 90, 1), ("dev", 16, 2), ("test", 16, 3)):
            write_part(data_dir / split / "part_1", make_rows(count, seed=seed))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"data_dir": str(data_dir)}))
    return recipe


def check_models_in_this_process() -> None:
    """A new process for each saved model would cost every attempt 10 s of imports."""
    import transformers.pipelines  # noqa: F401 - once, before the forks
    from conftest import check_in_this_process

    roundtrip.check_in_clean_process = check_in_this_process


def attempt(recipe: Path, run_dir: Path, seconds: float | None, failpoint: tuple[str, int] | None) -> int:
    """Train until the end, or until SIGKILL after `seconds` or at this call of a failpoint: the exit status."""
    pid = os.fork()
    if not pid:
        out = os.open(run_dir.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if failpoint:
            arm(*failpoint)
        record_utterances(run_dir.with_suffix(".ids"))
        sys.argv = [
            "train.py",
            "--config",
            str(recipe),
            "--output_dir",
            str(run_dir),
            "--resume_from_checkpoint",
            "auto",
        ]
        os._exit(exit_status(train.main))
    ends_at = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if ends_at is not None and time.monotonic() >= ends_at:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.002)


def arm(name: str, call: int) -> None:
    """Die by SIGKILL at this call of the failpoint's function."""
    owner, function, when = FAILPOINTS[name]
    original, calls = getattr(owner, function), itertools.count(1)

    def failing(*arguments: object, **settings: object) -> object:
        is_due = next(calls) == call
        if is_due and when == "half":
            table, rows = arguments[0], arguments[1:]
            data = table._format(rows)
            with table.path.open("ab") as file:
                file.write(data[: len(data) // 2])
        if is_due and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **settings)
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, failing)


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


def outcome(run_dir: Path) -> dict[str, object]:
    """All of a finished run that must not depend on kills."""
    with (run_dir / "training_log.csv").open(newline="") as file:
        log = [{k: v for k, v in row.items() if k not in MEASURED_COLUMNS} for row in csv.DictReader(file)]
    results = json.loads((run_dir / "train_results.json").read_text())
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    assert checkpoint.find_damage(newest) is None
    # Of an update that was done again after a kill, the last time counts.
    updates = {}
    for line in run_dir.with_suffix(".ids").read_text().splitlines():
        step, epoch, ids = json.loads(line)
        updates[step] = (epoch, sorted(ids))
    epochs: dict[int, list[str]] = {}
    for epoch, ids in updates.values():
        epochs.setdefault(epoch, []).extend(ids)
    assert all(len(ids) == len(set(ids)) for ids in epochs.values()), "an utterance was seen twice in an epoch"
    complete = [len(ids) for ids in epochs.values()][:-1]
    assert len(set(complete)) <= 1, f"epochs of {complete} utterances"
    return {
        "log": log,
        "samples": (run_dir / "eval_samples.csv").read_bytes(),
        "results": {name: value for name, value in results.items() if name not in MEASURED_RESULTS},
        "tensors": load_file(newest / checkpoint.TENSORS_FILE),
        "model": load_file(run_dir / "model" / "model.safetensors"),
        "trained": updates,
    }


def compare(found: dict[str, object], whole: dict[str, object]) -> None:
    """Fail at the first difference."""
    for name in ("log", "samples", "results", "trained"):
        assert found[name] == whole[name], name
    for name in ("tensors", "model"):
        assert found[name].keys() == whole[name].keys()
        assert all(torch.equal(found[name][key], whole[name][key]) for key in whole[name]), name


if __name__ == "__main__":
    main()
