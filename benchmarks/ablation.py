"""What each lever buys on an unseen voice: real digits, three speakers train, the fourth is the test.

    python benchmarks/ablation.py --corpus ../shared/corpora/digits --work_dir runs/ablation
    python benchmarks/ablation.py ... --arms plain speed best --seeds 1                (a part of it)
    python benchmarks/ablation.py ... --arms plain best --test_speaker jackson --work_dir runs/ablation_jackson

Every arm is configs/digits.yaml from random weights with the settings in ARMS, trained by train.py for the same number
of updates with three seeds; --demo_model adds arms that start from the demo's model. A cell (arm, seed) is a run
directory that is kept when it has ended; the same command goes on where it stopped, --only_print prints the table of
what there is: WER on the unseen voice, the difference from the plain recipe with its paired 95 % interval (bootstrap
over utterances and over seeds, which stand beside each other in both arms), and WER on known voices. Cells run --jobs
at a time with one thread each.

The settings of `best` were chosen by trying on the voice of theo; what they are worth is seen on another one.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import pandas
from programs import run_program
from rich import box
from rich.table import Table

from progress import print_table

TIME_MASKS = "--mask_time_prob 0.1 --mask_time_length 2"
CONSISTENCY = f"--consistency_weight 0.2 {TIME_MASKS}"
ROOMS_AND_LINES = "--augment_reverb simulated --augment_reverb_seconds 0.05 0.3 --augment_band_hz 1200 4000"
ALL_DROPOUTS = " ".join(
    f"--{place}_dropout 0.1" for place in ("hidden", "attention", "activation", "feat_proj", "final")
)
# What is different from the plain recipe.
ARMS = {
    "plain": "",
    "speed": "--augment_speed 0.9 1.0 1.1",
    "speed_wide": "--augment_speed 0.8 0.85 0.9 0.95 1.0 1.05 1.1 1.15 1.2 1.25",
    "volume": "--augment_volume_db 6",
    "noise": "--augment_noise white pink babble",
    "reverb": "--augment_reverb simulated",
    "band": "--augment_band_hz 1200 4000",
    "gaps": "--augment_gap_seconds 0.05",
    "time_masks": TIME_MASKS,
    "masks": f"{TIME_MASKS} --mask_feature_prob 0.1 --mask_feature_length 8",
    "masks_long": "--mask_time_prob 0.1 --mask_time_length 5 --mask_feature_prob 0.05 --mask_feature_length 16",
    "cr_ctc": CONSISTENCY,
    "rate_2e-3": "--learning_rate 2e-3",
    "cosine": "--lr_scheduler_type cosine",
    "restarts": "--lr_scheduler_type cosine_with_restarts",
    "cyclic": "--lr_scheduler_type cyclic",
    "tri_stage": "--lr_scheduler_type tri_stage",
    "layer_decay": "--layer_lr_decay 0.8",
    "dropouts": ALL_DROPOUTS,
    "layerdrop": "--layerdrop 0.1",
    "weight_decay": "--weight_decay 0.1",
    "label_smoothing": "--label_smoothing 0.05",
    "ema": "--ema_decay 0.99",
    "average": "--average_best 3",
    "balanced": "--sample_by speaker --sampling_temperature balanced",
    "best": f"--learning_rate 2e-3 --augment_speed 0.9 1.0 1.1 {ROOMS_AND_LINES} {CONSISTENCY}",
}
ARMS["best_tri_stage"] = f"{ARMS['best']} --lr_scheduler_type tri_stage"
# With --demo_model, from its weights instead of random ones; what only makes sense there comes last.
DEMO_ARMS = {"plain": "", "best": ARMS["best"], "freeze": "--freeze_encoder_steps 100 --head_learning_rate 3e-3"}
COUNTS_FILE = "test_errors.csv"
# A cell is one thread wide; its steps are timed by the processor's clock, which does not see what else runs.
COST_STEPS = (20, 80)
RESAMPLES = 4_000


@dataclass(frozen=True)
class Cell:
    """One run: an arm, where it starts, a seed."""

    arm: str
    seed: int
    demo_model: str | None = None

    @property
    def name(self) -> str:
        """Of the arm in the table, and of its folder."""
        return f"demo_{self.arm}" if self.demo_model else self.arm

    @property
    def settings(self) -> str:
        """Flags of train.py."""
        return DEMO_ARMS[self.arm] if self.demo_model else ARMS[self.arm]

    def folder(self, work_dir: Path) -> Path:
        """Its run directory."""
        return work_dir / self.name / f"seed_{self.seed}"

    def arguments(self, data_dir: Path, folder: Path) -> list[str]:
        """Of train.py."""
        start = ["--model_name_or_path", self.demo_model] if self.demo_model else []
        return [
            *("--config", str(REPOSITORY / "configs" / "digits.yaml")),
            *("--data_dir", str(data_dir), "--output_dir", str(folder), "--seed", str(self.seed)),
            *("--save_steps", "750", "--dataloader_num_workers", "0", *start, *self.settings.split()),
        ]


def main() -> None:
    """Train what is missing, score it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=REPOSITORY.parent / "shared" / "corpora" / "digits")
    parser.add_argument("--work_dir", type=Path, required=True, help="keeps the cells")
    parser.add_argument("--test_speaker", default="theo", help="who is not heard in training")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--demo_model", help="model/ of the demo's run: adds arms that start from it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--only_print", action="store_true", help="the table of the cells that have ended")
    parser.add_argument("--cost", action="store_true", help="measure the time of an update of --arms instead")
    arguments = parser.parse_args()
    if not arguments.corpus.is_dir():
        sys.exit(f"{arguments.corpus} is not here: name the Free Spoken Digit Dataset's folder with --corpus")
    data_dir = prepare(arguments.corpus, arguments.work_dir, arguments.test_speaker)
    if arguments.cost:
        print_costs(arguments.arms, data_dir, arguments.work_dir)
        return
    cells = [Cell(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    if arguments.demo_model:
        cells += [Cell(arm, seed, arguments.demo_model) for seed in arguments.seeds for arm in DEMO_ARMS]
    if arguments.only_print:
        cells = [cell for cell in cells if (cell.folder(arguments.work_dir) / "train_results.json").is_file()]
    else:
        train_missing(cells, data_dir, arguments.work_dir, arguments.jobs)
    score_missing(cells, data_dir, arguments.work_dir)
    print_cells(cells, arguments.work_dir)


def prepare(corpus: Path, work_dir: Path, test_speaker: str) -> Path:
    """The shards, made once."""
    data_dir = work_dir / "data"
    if not (data_dir / "prepare.json").is_file():
        flags = ("--corpus", corpus, "--data_dir", data_dir, "--test_speakers", test_speaker)
        run_program("prepare.py", *flags, log=work_dir / "prepare.log")
    return data_dir


def train_missing(cells: list[Cell], data_dir: Path, work_dir: Path, jobs: int) -> None:
    """Run train.py for each cell that has not ended, the first seed of all arms first."""
    missing = [cell for cell in cells if not (cell.folder(work_dir) / "train_results.json").is_file()]
    with ThreadPoolExecutor(jobs) as pool:
        for number, cell in enumerate(pool.map(lambda cell: train(cell, data_dir, work_dir), missing), 1):
            print(f"{number} of {len(missing)} cells trained: {cell.name}, seed {cell.seed}", flush=True)


def train(cell: Cell, data_dir: Path, work_dir: Path) -> Cell:
    """One cell from its beginning; a part of an earlier try is removed."""
    folder = cell.folder(work_dir)
    shutil.rmtree(folder, ignore_errors=True)
    run_program("train.py", *cell.arguments(data_dir, folder), log=folder.with_suffix(".log"))
    shutil.rmtree(folder / "checkpoints")
    return cell


def score_missing(cells: list[Cell], data_dir: Path, work_dir: Path) -> None:
    """Each cell's best model on the test split, utterance by utterance, into COUNTS_FILE."""
    missing = [cell for cell in cells if not (cell.folder(work_dir) / COUNTS_FILE).is_file()]
    if not missing:
        return
    from config import EvaluateConfig
    from model_scorer import ModelScorer
    from processes import start_processes
    from scoring import evaluate
    from slices import errors_and_lengths

    accelerator = start_processes([], "")
    for cell in missing:
        folder = cell.folder(work_dir)
        config = EvaluateConfig(str(folder / "model"), str(data_dir), dataloader_num_workers=0)
        scorer = ModelScorer(config, accelerator)
        found = evaluate(scorer, scorer.dataset, np.arange(len(scorer.dataset)), f"scoring {cell.name} {cell.seed}")
        (errors_N, words_N), _ = errors_and_lengths(found.counts)
        counts = pandas.DataFrame({"id": list(scorer.dataset.column("id")), "errors": errors_N, "words": words_N})
        counts.to_csv(folder / COUNTS_FILE, index=False)
    accelerator.end_training()


@dataclass(frozen=True)
class Arm:
    """Of all its seeds: errors of each utterance by seed, words of each utterance, WER on known voices by seed."""

    name: str
    errors: dict[int, np.ndarray]
    words_N: np.ndarray
    known_wers: list[float]

    @property
    def wers(self) -> list[float]:
        """On the unseen voice, by seed."""
        return [float(errors_N.sum() / self.words_N.sum()) for errors_N in self.errors.values()]


def read_arms(cells: list[Cell], work_dir: Path) -> Iterator[Arm]:
    """Arms in the order of the cells."""
    for name in dict.fromkeys(cell.name for cell in cells):
        of_arm = [cell for cell in cells if cell.name == name]
        tables = {cell.seed: pandas.read_csv(cell.folder(work_dir) / COUNTS_FILE) for cell in of_arm}
        results = [json.loads((cell.folder(work_dir) / "train_results.json").read_text()) for cell in of_arm]
        yield Arm(
            name,
            {seed: table["errors"].to_numpy() for seed, table in tables.items()},
            next(iter(tables.values()))["words"].to_numpy(),
            [result["best_eval_wer"] for result in results],
        )


def difference(plain: Arm, arm: Arm) -> tuple[float, float, float, int]:
    """WER of an arm less that of the plain one over the seeds that both have, its 95 % limits, and how many seeds.

    Utterances and seeds are both drawn with replacement (a two-way bootstrap; Owen, Annals of Applied Statistics 1,
    2007); with three seeds their own spread is known badly, and the limits are too narrow rather than too wide.
    """
    seeds = [seed for seed in arm.errors if seed in plain.errors]
    more_SN = np.stack([arm.errors[seed] - plain.errors[seed] for seed in seeds])
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        utterances = rng.integers(more_SN.shape[1], size=more_SN.shape[1])
        errors_N = more_SN[rng.integers(len(seeds), size=len(seeds))].mean(0)[utterances]
        drawn.append(errors_N.sum() / arm.words_N[utterances].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(more_SN.mean(0).sum() / arm.words_N.sum()), float(low), float(high), len(seeds)


def print_cells(cells: list[Cell], work_dir: Path) -> None:
    """The table, as it stands in README.md."""
    arms = list(read_arms(cells, work_dir))
    plain = {arm.name.removesuffix("plain"): arm for arm in arms if arm.name.endswith("plain")}
    table = Table(box=box.MARKDOWN, pad_edge=False)
    for name in ("arm", "WER, unseen voice", "of each seed", "against plain, same seeds", "", "known voices"):
        table.add_column(name)
    for arm in arms:
        base = plain.get("demo_" if arm.name.startswith("demo_") else "")
        said = ("", "") if base is None or arm is base else describe(*difference(base, arm))
        seeds = ", ".join(f"{wer:.1%}" for wer in arm.wers)
        table.add_row(arm.name, f"{np.mean(arm.wers):.1%}", seeds, *said, f"{np.mean(arm.known_wers):.1%}")
    print_table(table)


def describe(rate: float, low: float, high: float, num_seeds: int) -> tuple[str, str]:
    """A difference with its limits, and what it means."""
    said = f"{100 * rate:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    if num_seeds == 1:
        return said, "one seed: unknown"
    return said, "may be chance" if low <= 0 <= high else "better" if rate < 0 else "worse"


def print_costs(arms: list[str], data_dir: Path, work_dir: Path) -> None:
    """Processor time of an update of each arm over the plain recipe's, from runs of COST_STEPS updates."""
    seconds = {arm: cost_of_update(arm, data_dir, work_dir / "cost") for arm in dict.fromkeys(["plain", *arms])}
    table = Table(box=box.MARKDOWN, pad_edge=False)
    for name in ("arm", "seconds of one core per update", "over plain"):
        table.add_column(name)
    for arm, one in seconds.items():
        table.add_row(arm, f"{one:.3f}", f"{one / seconds['plain']:.2f}")
    print_table(table)


def cost_of_update(arm: str, data_dir: Path, work_dir: Path) -> float:
    """What the longer run takes more than the shorter one, by update."""
    taken = []
    for steps in COST_STEPS:
        folder = work_dir / f"{arm}_{steps}"
        shutil.rmtree(folder, ignore_errors=True)
        limits = ["--max_steps", str(steps), "--eval_steps", str(steps), "--do_predict", "false"]
        arguments = Cell(arm, 1).arguments(data_dir, folder)
        taken.append(run_program("train.py", *arguments, *limits, log=folder.with_suffix(".log")))
        shutil.rmtree(folder)
    return (taken[1] - taken[0]) / (COST_STEPS[1] - COST_STEPS[0])


if __name__ == "__main__":
    main()
