"""The error rate over the share of the training data, and what twice the data would bring.

    python benchmarks/learning_curve.py --data_dir data/digits [--config configs/digits.yaml] [--max_steps 400]
        [--shares 0.125 0.25 0.5 1] [--seeds 1] [--work_dir learning_curve]

One run of train.py for each share and seed, all with the same number of updates, so that a smaller share is heard more
often and only the data differ; then learning_curve.py over them. The subsets of a seed lie in each other. Each run is a
cell in --work_dir that is kept, so that the script goes on where it stopped; two run at a time. The number of updates
must be enough for the largest share: with fewer the curve is one of the updates.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from programs import run_program

REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    """Train what is missing, then lay the curve through all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "digits.yaml")
    parser.add_argument("--work_dir", type=Path, default=Path("learning_curve"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--max_steps", type=int, default=400)
    arguments = parser.parse_args()
    if not (arguments.data_dir / "prepare.json").is_file():
        raise SystemExit(
            f"skipped: {arguments.data_dir} holds no prepared data; {arguments.config} says how to make it"
        )
    cells = [(share, seed) for seed in arguments.seeds for share in sorted(arguments.shares, reverse=True)]
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda cell: train(arguments, *cell), cells))
    plot = arguments.work_dir / "learning_curve.png"
    subprocess.run([sys.executable, REPOSITORY / "learning_curve.py", *folders, "--output", plot], check=True)


def train(arguments: argparse.Namespace, share: float, seed: int) -> Path:
    """One run to its end; finished ones are kept. Returns its folder."""
    folder = arguments.work_dir / f"share_{share:g}_seed_{seed}"
    settings = {
        "config": arguments.config, "data_dir": arguments.data_dir, "output_dir": folder, "train_fraction": share,
        "seed": seed, "max_steps": arguments.max_steps, "eval_steps": max(1, arguments.max_steps // 4),
        "save_steps": arguments.max_steps, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    pairs = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    run_program("train.py", *pairs, log=folder.parent / f"{folder.name}.log")
    return folder


if __name__ == "__main__":
    main()
