"""Are wrong transcripts found? Planted ones, their place in the ranking, and what leaving them out is worth.

    python benchmarks/planted_errors.py [--work_dir planted_errors] [--share 0.1] [--max_steps 400] [--seed 1]

Real digits (Free Spoken Digit Dataset), where the training clips of three speakers get the transcripts of each other:
a tenth of them, each another word than was said. The dev set (known voices) and the test set (a new voice) stay right.
Five runs of train.py: on the clean and on the planted transcripts, on the two halves of the planted ones
(--train_fraction 0.5, with and without --train_rest), and on what a ranking leaves of them. Two rankings: by the model
that was trained on all, and by the halves, each of which judges the other (--other_half).

Precision and recall are the same at the true number of errors. Each run and ranking is a cell in --work_dir that is
kept, so that the script goes on where it stopped; two cells run at a time.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np

from benchmarks.programs import run_program
from data import ShardDataset
from result_layout import RANKING_FACTS_FILE, RANKING_FILE

CORPUS = REPOSITORY.parent / "shared" / "corpora" / "digits"
HELD_OUT_SPEAKER = "theo"
# Of texts between two clips, per clip: enough to forget the order that they began in.
EXCHANGES = 20
# Each gets the larger the more suspect a clip is.
MEASURES: dict[str, Callable[[dict[str, str]], float]] = {
    "score": lambda row: float(row["score"]),
    "CTC loss per label": lambda row: float(row["ctc_loss_per_label"]),
    "1 - best-path agreement": lambda row: -float(row["best_path_agreement"]),
    "deviation of the speech rate": lambda row: abs(float(row["rate_deviation"] or 0)),
}
RUNS_WITH_FLAGS = {
    "half_a": ("planted_data", ["--train_fraction", "0.5"]),
    "half_b": ("planted_data", ["--train_fraction", "0.5", "--train_rest"]),
    "planted": ("planted_data", []),
    "clean": ("clean_data", []),
}


def main() -> None:
    """Prepare, train, rank, train again, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--work_dir", type=Path, default=Path("planted_errors"))
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not (arguments.corpus / "manifest.csv").is_file():
        raise SystemExit(f"skipped: no digits in {arguments.corpus}; name their folder with --corpus")
    bench = Bench(arguments.work_dir.absolute(), arguments.max_steps, arguments.seed)
    bench.folder.mkdir(parents=True, exist_ok=True)
    wrong = bench.prepare(arguments.corpus.absolute(), arguments.share)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(bench.train, name, *how) for name, how in RUNS_WITH_FLAGS.items()]:
            done.result()
        half_a, half_b = (bench.folder / half / "model" for half in ("half_a", "half_b"))
        rankings = {
            "ranking_heard": pool.submit(bench.rank, "ranking_heard", bench.folder / "planted" / "model"),
            "ranking_halves": pool.submit(bench.rank, "ranking_halves", half_a, "--other_half", half_b),
        }
        ranked = {name: ranking.result() for name, ranking in rankings.items()}
    bench.train("pruned", "planted_data", ["--prune_list", bench.folder / "ranking_halves" / RANKING_FILE])
    for name, rows in ranked.items():
        print_ranking(name, rows, wrong, json.loads((bench.folder / name / RANKING_FACTS_FILE).read_text()))
    print_runs(bench.folder, wrong)


class Bench:
    """The cells of one work folder."""

    def __init__(self, folder: Path, max_steps: int, seed: int) -> None:
        self.folder, self.max_steps, self.seed = folder, max_steps, seed

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def prepare(self, corpus: Path, share: float) -> set[str]:
        """`clean_data`, and `planted_data` of the same clips in the same splits; the ids of the planted errors."""
        clean, planted = self.folder / "clean_data", self.folder / "planted_data"
        run_program(
            "prepare.py", "--corpus", corpus, "--data_dir", clean, "--test_speakers", HELD_OUT_SPEAKER,
            log=self._log("prepare_clean"),
        )  # fmt: skip
        rows = [row for split in ("train", "dev", "test") for row in _rows(clean / split, corpus)]
        texts = {row["id"]: row["text"] for row in rows if row["split"] == "train"}
        swapped = swap_texts(texts, share, self.seed)
        manifest = self.folder / "manifest.csv"
        with manifest.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(row | {"text": swapped.get(row["id"], row["text"])} for row in rows)
        run_program(
            "prepare.py", "--corpus", manifest, "--data_dir", planted, "--audio_root", corpus,
            log=self._log("prepare_planted"),
        )  # fmt: skip
        return set(swapped)

    def train(self, name: str, data: str, flags: list[object]) -> None:
        """One run of train.py to its end; finished ones are kept."""
        settings = {
            "config": REPOSITORY / "configs" / "digits.yaml", "data_dir": self.folder / data,
            "output_dir": self.folder / name, "max_steps": self.max_steps, "eval_steps": max(1, self.max_steps // 4),
            "save_steps": max(1, self.max_steps // 2), "seed": self.seed, "dataloader_num_workers": 0,
            "resume_from_checkpoint": "auto",
        }  # fmt: skip
        pairs = [part for key, value in settings.items() for part in (f"--{key}", value)]
        run_program("train.py", *pairs, *flags, log=self._log(name))

    def rank(self, name: str, model: Path, *flags: object) -> list[dict[str, str]]:
        """The rows of one ranking of the planted data; a finished one is kept."""
        folder = self.folder / name
        if not (folder / RANKING_FACTS_FILE).is_file():
            run_program(
                "evaluate.py", "--rank_train", "--model_name_or_path", model, "--data_dir",
                self.folder / "planted_data", "--output_dir", folder, "--per_device_eval_batch_size", 64, *flags,
                log=self._log(name),
            )  # fmt: skip
        with (folder / RANKING_FILE).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def _rows(folder: Path, corpus: Path) -> list[dict[str, str]]:
    dataset = ShardDataset(folder)
    columns = zip(*(dataset.column(name) for name in ("id", "text", "speaker")), strict=True)
    return [
        {"id": name, "path": str(corpus / name), "text": text, "speaker": speaker, "split": folder.name}
        for name, text, speaker in columns
    ]


def swap_texts(texts: dict[str, str], share: float, seed: int) -> dict[str, str]:
    """New texts for a share of the clips: each has the text of another of them, which differs from its own.

    Sorted by text and rotated by the largest group, no clip meets its own text, unless one has half of them; pairs are
    then exchanged at random where both stay wrong, since a rotation would call every word by the same other one.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(sorted(texts))[: round(share * len(texts))].tolist()
    chosen.sort(key=lambda name: texts[name])
    largest = max(Counter(texts[name] for name in chosen).values())
    swapped = {name: texts[chosen[(place + largest) % len(chosen)]] for place, name in enumerate(chosen)}
    for first, second in rng.choice(chosen, (EXCHANGES * len(chosen), 2)).tolist():
        if swapped[second] != texts[first] and swapped[first] != texts[second]:
            swapped[first], swapped[second] = swapped[second], swapped[first]
    assert all(swapped[name] != texts[name] for name in chosen)
    return swapped


def print_ranking(name: str, rows: list[dict[str, str]], wrong: set[str], facts: dict[str, object]) -> None:
    """Each measure against the planted errors, and the suggested cut against what it expects of itself."""
    is_wrong = np.array([row["id"] in wrong for row in rows])
    heard = sum(row["heard"] == "yes" for row in rows)
    print(f"\n{name}: {len(rows)} clips, {len(wrong)} planted errors, {heard} judged by a model that heard them")
    print(f"{'measure':<30}{'precision = recall':>20}{'area under ROC':>16}")
    for measure, of_row in MEASURES.items():
        values = np.array([of_row(row) for row in rows])
        print(f"{measure:<30}{precision_at(values, is_wrong):>20.3f}{area(values, is_wrong):>16.3f}")
    suggested = np.array([row["suggested"] == "yes" for row in rows])
    if not suggested.any():
        print("nothing is suggested")
        return
    found = np.count_nonzero(suggested & is_wrong)
    print(
        f"suggested: {suggested.sum()} clips; precision {found / suggested.sum():.3f} (expected at most "
        f"{facts['expected_precision']:.3f}), recall {found / len(wrong):.3f} (expected "
        f"{facts['expected_recall']:.3f}); at most {facts['expected_wrong']:.0f} errors expected"
    )


def precision_at(values: np.ndarray, is_wrong: np.ndarray) -> float:
    """Share of wrong clips among as many of the highest as there are wrong ones; of ties at the limit, their mean."""
    count = int(is_wrong.sum())
    limit = np.sort(values)[-count]
    above, at = values > limit, values == limit
    tied = (count - above.sum()) * is_wrong[at].mean()
    return float((is_wrong[above].sum() + tied) / count)


def area(values: np.ndarray, is_wrong: np.ndarray) -> float:
    """The chance that a wrong clip has the greater value; a tie counts half."""
    wrong, right = values[is_wrong], values[~is_wrong]
    return float((wrong[:, None] > right).mean() + 0.5 * (wrong[:, None] == right).mean())


def print_runs(folder: Path, wrong: set[str]) -> None:
    """Error rates with their limits: what the errors cost, and what leaving clips out gains."""
    print(f"\n{'run':<10}{'clips':>7}{'wrong':>7}{'dev WER (known voices)':>28}{'test WER (a new voice)':>28}")
    for name in ("clean", "planted", "pruned"):
        results = json.loads((folder / name / "train_results.json").read_text())
        with (folder / name / "drop_list.csv").open(newline="", encoding="utf-8") as file:
            left_out = {row["id"] for row in csv.DictReader(file)}
        errors = 0 if name == "clean" else len(wrong - left_out)
        rates = "".join(f"{_rate(results, one):>28}" for one in ("best_eval_wer", "test_wer"))
        print(f"{name:<10}{results['train_samples']:>7}{errors:>7}{rates}")


def _rate(results: dict[str, float], name: str) -> str:
    limits = [results.get(f"{name}_{side}") for side in ("low", "high")]
    return f"{results[name]:.1%}" + ("" if None in limits else f" [{limits[0]:.1%}, {limits[1]:.1%}]")


if __name__ == "__main__":
    main()
