"""What grows with the corpus: time to the first update, a resume, an evaluation, memory of the index, an epoch's plan.

    python benchmarks/growth.py [--sizes 1000 10000 100000 136747 1000000 1500000] [--repetitions 2] [--folder DIR]

Prepared sets of these sizes (synthetic_corpus.py; smaller ones share the parts of the largest; 7 GB of disk and 10
minutes for 1.5 million utterances, kept only in --folder) and a tiny model, so that the figures are those of the data.
Each start is a new process; its clock runs from the launch to the end of the first update, imports included, and the
least of the repetitions counts. Cold: the facts about the texts and splits are found anew. Warm: they lie in the cache
beside the data. Evaluation: from its call to the first batch that is ready, the groups of its table included. Memory
is anonymous (RssAnon).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import train

SIZES = (1_000, 10_000, 100_000, 136_747, 1_000_000, 1_500_000)
MOST_DEV_UTTERANCES = 16_400
CHECKPOINT_STEP = 2
# Two convolutions with a frame of 20 ms, one layer.
TINY_MODEL = {
    "model_type": "wav2vec2", "conv_dim": [16, 16], "conv_kernel": [20, 16], "conv_stride": [20, 16],
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "hidden_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
COLUMNS = ("cold", "warm", "imports", "launcher", "resume", "evaluation", "plan", "index MB", "peak MB")


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--folder", help="keep the prepared sets here, and use those that lie there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve()
        sets = make_sets(folder, sorted(arguments.sizes))
        print("seconds; of CPU time in brackets\n")
        print(f"{'utterances':>10}" + "".join(f"{name:>15}" for name in COLUMNS))
        for size, data_dir in sets.items():
            row = measure_size(data_dir, Path(temporary), arguments.repetitions)
            print(f"{size:>10,}" + "".join(f"{row[name]:>15}" for name in COLUMNS), flush=True)


def make_sets(folder: Path, sizes: Sequence[int]) -> dict[int, Path]:
    """A prepared set for each size; whole parts are those of the largest one."""
    from synthetic_corpus import CHUNK_SIZE, write_mark, write_part

    sets = {}
    for size in sizes:
        data_dir, parts = folder / f"utterances_{size}", {}
        for split, count in {"train": size, "dev": dev_size(size), "test": dev_size(size)}.items():
            (data_dir / split).mkdir(parents=True, exist_ok=True)
            for number, first in enumerate(range(0, count, CHUNK_SIZE), 1):
                parts[split], part = number, data_dir / split / f"part_{number}"
                rows = range(first, min(first + CHUNK_SIZE, count))
                original = folder / "parts" / f"{split}_{rows.start}_{rows.stop}"
                if not original.exists():
                    shutil.rmtree(original.with_suffix(".unfinished"), ignore_errors=True)
                    write_part(original.with_suffix(".unfinished"), split, rows)
                    original.with_suffix(".unfinished").rename(original)
                if not part.is_symlink():
                    part.symlink_to(original, target_is_directory=True)
        write_mark(data_dir, parts)
        sets[size] = data_dir
    return sets


def dev_size(size: int) -> int:
    """Common Voice's dev and test sets are a tenth of a small language, and no more than these of English."""
    return min(MOST_DEV_UTTERANCES, max(100, size // 10))


def measure_size(data_dir: Path, temporary: Path, repetitions: int) -> dict[str, str]:
    """The columns of one set, as they are shown."""
    recipe, run_dir = write_recipe(temporary / "recipe.yaml", data_dir), temporary / "run"
    shutil.rmtree(data_dir / "preflight_cache", ignore_errors=True)
    cold = start("first", recipe, run_dir)
    warm = [start("first", recipe, run_dir) for _ in range(repetitions)]
    launched = [start("first", recipe, run_dir, launcher=True) for _ in range(repetitions)]
    start("checkpoint", recipe, run_dir, keeps=True)
    resumed = [start("first", recipe, run_dir, "--resume_from_checkpoint", "last", keeps=True) for _ in warm]
    shutil.rmtree(run_dir)
    index = start("index", recipe, run_dir)
    found = {
        "cold": [cold["first"]],
        "warm": [one["first"] for one in warm],
        "imports": [one["imports"] for one in warm],
        "launcher": [one["first"] for one in launched],
        "resume": [one["first"] for one in resumed],
        "evaluation": [one["evaluation"] for one in warm],
        "plan": [index["plan"]],
    }
    shown = {name: "{:.1f} ({:.1f})".format(*map(min, zip(*times, strict=True))) for name, times in found.items()}
    return shown | {"index MB": f"{index['megabytes']:.0f}", "peak MB": f"{max(one['peak'] for one in warm):.0f}"}


def write_recipe(path: Path, data_dir: Path) -> Path:
    """The tiny model with a published vocabulary."""
    settings = {
        "data_dir": str(data_dir), "model_config": TINY_MODEL, "vocabulary": "large_960h", "max_steps": 1_000,
        "per_device_train_batch_size": 8, "logging_steps": 1_000, "eval_steps": 1_000, "save_steps": CHECKPOINT_STEP,
    }  # fmt: skip
    path.write_text(json.dumps(settings))  # which is YAML, too
    return path


def start(
    mode: str, recipe: Path, run_dir: Path, *flags: str, launcher: bool = False, keeps: bool = False
) -> dict[str, object]:
    """What a new process measures; it ends behind that."""
    program = [shutil.which("accelerate"), "launch", "--quiet"] if launcher else [sys.executable]
    report = run_dir.parent / "report.json"
    report.unlink(missing_ok=True)
    environment = os.environ | {"GROWTH_STARTED_AT": repr(time.monotonic()), "GROWTH_REPORT": str(report)}
    command = [*program, __file__, mode, "--config", str(recipe), "--output_dir", str(run_dir), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not report.exists():
        sys.exit(f"{' '.join(command)} ended without a first update:\n{done.stderr}")
    if not keeps:
        shutil.rmtree(run_dir, ignore_errors=True)
    return json.loads(report.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Inside the new process


def measure(mode: str, arguments: list[str]) -> None:
    """train.py as far as `mode` asks for, or the index alone."""
    import train

    launched_at, facts = float(os.environ["GROWTH_STARTED_AT"]), {}

    def now() -> tuple[float, float]:
        return time.monotonic() - launched_at, time.process_time()

    def end() -> None:
        facts["peak"] = status_megabytes("VmHWM")
        Path(os.environ["GROWTH_REPORT"]).write_text(json.dumps(facts))
        train.end_loaders()
        os._exit(0)

    facts["imports"], step = now(), train.train_step

    def first_step(run: train.Run, update: train.Update) -> None:
        step(run, update)
        facts["first"] = began_at = now()
        batch = prepare_evaluation(run)
        facts["evaluation"] = difference(began_at, now())
        assert len(batch.ids)
        end()

    if mode == "index":
        facts |= measure_index(Path(json.loads(Path(arguments[1]).read_text())["data_dir"]), now)
        end()
    if mode == "first":
        train.train_step = first_step
    else:
        save = train.Run.save_checkpoint
        train.Run.save_checkpoint = lambda run: (save(run), end())
    sys.argv = ["train.py", *arguments]
    sys.exit(train.exit_status(train.main))


def difference(before: tuple[float, float], after: tuple[float, float]) -> list[float]:
    """Seconds and CPU seconds between two moments."""
    return [late - early for early, late in zip(before, after, strict=True)]


def prepare_evaluation(run: "train.Run") -> "train.Batch":
    """The first batch of an evaluation; what else comes before it is made, too."""
    from data import evaluation_loader

    assert run.eval_breakdown.groupings
    return next(iter(evaluation_loader(run.eval_set, run.eval_rows, run.collate, run.eval_cut, num_workers=0)))


def measure_index(data_dir: Path, now: Callable[[], tuple[float, float]]) -> dict[str, object]:
    """Anonymous memory of an open training split with its measures and plan, and the time to plan an epoch."""
    import numpy as np

    from data import BatchPlan, ShardDataset

    before = status_megabytes("RssAnon")
    dataset = ShardDataset(data_dir / "train")
    dataset.numpy_column("rms")
    plan = BatchPlan(np.arange(len(dataset)), dataset.num_samples, 8, seed=42)
    started_at = now()
    order = plan.epoch_order(0)
    seconds = difference(started_at, now())
    assert len(order) == len(dataset)
    return {"plan": seconds, "megabytes": status_megabytes("RssAnon") - before}


def status_megabytes(name: str) -> float:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


if __name__ == "__main__":
    if "GROWTH_REPORT" in os.environ:
        measure(sys.argv[1], sys.argv[2:])
    else:
        main()
