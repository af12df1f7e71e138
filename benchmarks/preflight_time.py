"""Time of preflight.py on a set of the size of Common Voice English: the first time, and from its cache.

    python benchmarks/preflight_time.py [--train 136747] [--dev 58619] [--folder DIR]

A prepared set is made with that many utterances (synthetic_corpus.py), of silence, since no check reads the audio. The
model is the demo's, so that the figure is that of the checks and not of a large model's two passes. Both runs are
started from the shell; the time to import the program is measured beside them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from synthetic_corpus import write_set


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=136_747)
    parser.add_argument("--dev", type=int, default=58_619)
    parser.add_argument("--folder", help="keep the prepared set here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary) / "data"
        if not folder.exists():
            write_set(folder, {"train": arguments.train, "dev": arguments.dev})
        recipe = Path(temporary) / "recipe.yaml"
        write_recipe(recipe, folder)
        imports = seconds_of([sys.executable, "-c", "import preflight, assembly"])
        print(f"{'':<28}{'seconds':>9}{'less imports':>14}")
        print(f"{'imports alone':<28}{imports:>9.1f}")
        for cache in folder.glob("preflight_cache/*"):
            cache.unlink()
        for name in ("first time", "from the cache"):
            seconds = seconds_of([sys.executable, "preflight.py", "--config", str(recipe)])
            print(f"{name:<28}{seconds:>9.1f}{seconds - imports:>14.1f}", flush=True)


def seconds_of(command: list[str]) -> float:
    """Wall time of a command, which must succeed."""
    started_at = time.perf_counter()
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started_at


def write_recipe(path: Path, data_dir: Path) -> None:
    """The demo's model on the set, with the English recipe's limits."""
    demo = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    english = {
        "data_dir": str(data_dir), "output_dir": str(path.parent / "run"), "demo_corpus": False, "do_predict": False,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(demo | english | {"max_duration_in_seconds": 15.0}))


if __name__ == "__main__":
    main()
