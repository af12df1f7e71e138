"""What pre-training on speech without text buys: the same fine-tuning on Yoruba, with it and without.

    python benchmarks/pretraining.py --corpus ../shared/corpora/yo --work_dir runs/pretraining_benchmark
    python benchmarks/pretraining.py ... --arms without both --seeds 1 --pretraining_steps 200     (a part of it)
    python benchmarks/pretraining.py ... --model runs/demo/model     (every arm begins with it, not with random weights)
    python benchmarks/pretraining.py ... --only_print

Speech without text is the audio of the Yoruba training clips, and their sentences as espeak-ng's voices of other
languages read them (synthetic, of sounds that are not quite Yoruba's). Every arm pre-trains a small model from random
weights, or --model further, on one of them, on both, or not at all, and then fine-tunes on the Yoruba training clips
with their texts, by the same recipe and with a new head. The release's dev and test clips are never heard in
pre-training. A pre-training and a cell (arm, seed) are run directories that go on where they stopped, and are kept when
they have ended; --only_print prints the tables of what there is: loss and CER on dev by step, mean over the seeds, and
WER and CER on test. Cells run --jobs at a time with one thread each.
"""

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import pandas
import yaml
from programs import run_program
from rich import box
from rich.table import Table

from corpora import read_texts
from demo import _find_espeak, _speak_alone, _Speech
from progress import print_table

# Voices that read Yoruba's letters with about its vowels and syllables; two speakers of each.
VOICES = ("sw", "sw+f2", "it+m3", "it+f4")
WORDS_PER_MINUTE, PITCH = 160, 50
# Speech that each arm is pre-trained on.
ARMS = {"without": (), "espeak": ("espeak",), "yoruba": ("yoruba",), "both": ("yoruba", "espeak")}
# The demo's model with a quantizer of its size.
OF_PRETRAINING = {
    "num_codevector_groups": 2, "num_codevectors_per_group": 64, "codevector_dim": 128, "proj_codevector_dim": 128,
    "num_negatives": 50,
}  # fmt: skip
# No masks: a model that was not pre-trained has a drawn embedding of masked frames, and learns to hear that first.
OF_FINE_TUNING = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
DEMO = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
MODEL = DEMO["model_config"] | OF_PRETRAINING | OF_FINE_TUNING
PRETRAINING = {
    "seed": 1, "per_device_train_batch_size": 8, "max_batch_seconds": 160.0,
    "per_device_eval_batch_size": 8, "learning_rate": 1e-3, "warmup_ratio": 0.1, "logging_steps": 25,
    "eval_steps": 100, "save_steps": 100, "dataloader_num_workers": 0, "max_duration_in_seconds": 20.0,
    "gumbel_temperature_decay": 0.999,
}  # fmt: skip
FINE_TUNING = {
    "vocabulary": "train", "head": "new", "case": "lower", "characters_to_ignore": ',?.!-;:"“”‘’…–—()',
    "freeze_feature_encoder": False, "per_device_train_batch_size": 8, "max_batch_seconds": 60.0,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-3, "warmup_steps": 100, "logging_steps": 50, "eval_steps": 50, "save_steps": 100,
    "dataloader_num_workers": 0, "max_duration_in_seconds": 20.0,
}  # fmt: skip


def main() -> None:
    """Prepare, pre-train and fine-tune what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=REPOSITORY.parent / "shared" / "corpora" / "yo")
    parser.add_argument("--work_dir", type=Path, required=True, help="keeps data and cells")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of fine-tuning")
    parser.add_argument("--pretraining_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--model", type=Path, help="that every arm begins with, and of which it keeps the encoder")
    parser.add_argument("--only_print", action="store_true", help="the tables of the cells that have ended")
    arguments = parser.parse_args()
    cells = [Cell(arm, seed, arguments.work_dir) for seed in arguments.seeds for arm in arguments.arms]
    if not arguments.only_print:
        if not (arguments.corpus / "train.tsv").is_file():
            sys.exit(f"{arguments.corpus} is not here: name a Common Voice release of Yoruba with --corpus")
        prepare(arguments.corpus, arguments.work_dir)
        arms = [arm for arm in arguments.arms if ARMS[arm]]
        start = start_of(arguments.model)
        steps = arguments.pretraining_steps
        in_parallel(lambda arm: pretrain(arm, arguments.work_dir, steps, start), arms, arguments.jobs)
        in_parallel(lambda cell: fine_tune(cell, arguments.steps, start), cells, arguments.jobs)
    print_pretraining([arm for arm in arguments.arms if ARMS[arm]], arguments.work_dir)
    print_cells([cell for cell in cells if is_finished(cell.folder)])


@dataclass(frozen=True)
class Cell:
    """One fine-tuning: an arm and a seed."""

    arm: str
    seed: int
    work_dir: Path

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return self.work_dir / self.arm / f"seed_{self.seed}"


def in_parallel(work: Callable[[object], str], items: Iterable[object], jobs: int) -> None:
    """Each of the items, a line for each that is done."""
    items = list(items)
    with ThreadPoolExecutor(jobs) as pool:
        for number, done in enumerate(pool.map(work, items), 1):
            print(f"{number} of {len(items)}: {done}", flush=True)


def is_finished(folder: Path) -> bool:
    """Whether a run has ended."""
    return (folder / "train_results.json").is_file()


def prepare(corpus: Path, work_dir: Path) -> None:
    """The shards with text, those without, and the synthetic ones."""
    speak(corpus, work_dir / "espeak_speech")
    for name, source, flags in (
        ("transcribed", corpus, ()),
        ("yoruba", corpus, ("--untranscribed",)),
        ("espeak", work_dir / "espeak_speech", ("--untranscribed",)),
    ):
        if not (work_dir / "data" / name / "prepare.json").is_file():
            flags = ("--corpus", source, "--data_dir", work_dir / "data" / name, *flags)
            run_program("prepare.py", *flags, log=work_dir / "data" / f"{name}.log")


def speak(corpus: Path, folder: Path) -> None:
    """The sentences of the training clips by each of VOICES, a folder for each."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    # Of a letter with a dot or a tone, these voices would read out the name.
    texts = (unicodedata.normalize("NFD", text) for text in read_texts(corpus / "train.tsv") if text)
    sentences = ["".join(one for one in text if not unicodedata.combining(one)) for text in texts]
    speeches = []
    for voice in VOICES:
        (unfinished / voice).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(sentences):
            path = f"{voice}/{number:04d}.wav"
            speeches.append(_Speech(path, "train", text, voice, WORDS_PER_MINUTE, PITCH))
    _speak_alone(unfinished, speeches, *_find_espeak())
    unfinished.rename(folder)


def start_of(model: Path | None) -> dict[str, object]:
    """Settings that say what every arm begins with."""
    if model is None:
        return {"model_config": MODEL}
    return {"model_name_or_path": str(model), "model_overrides": OF_PRETRAINING | OF_FINE_TUNING}


def pretrain(arm: str, work_dir: Path, steps: int, start: dict[str, object]) -> str:
    """pretrain.py on the arm's speech."""
    folder = work_dir / arm / "pretraining"
    if not is_finished(folder):
        data = [str(work_dir / "data" / name) for name in ARMS[arm]]
        settings = PRETRAINING | start | {"data_dir": data, "max_steps": steps}
        run_program("pretrain.py", *resuming(folder, settings), log=folder.with_suffix(".log"))
    return f"pre-trained on {' and '.join(ARMS[arm])}"


def fine_tune(cell: Cell, steps: int, start: dict[str, object]) -> str:
    """train.py with the texts, from the arm's weights."""
    if not is_finished(cell.folder):
        pretrained = {"model_name_or_path": str(cell.work_dir / cell.arm / "pretraining" / "model")}
        settings = FINE_TUNING | (pretrained if ARMS[cell.arm] else start)
        settings |= {"data_dir": str(cell.work_dir / "data" / "transcribed"), "max_steps": steps, "seed": cell.seed}
        run_program("train.py", *resuming(cell.folder, settings), log=cell.folder.with_suffix(".log"))
    return f"fine-tuned {cell.arm}, seed {cell.seed}"


def resuming(folder: Path, settings: dict[str, object]) -> list[object]:
    """Flags of a run that begins, or goes on where it was stopped."""
    recipe = folder.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(settings, allow_unicode=True))
    return ["--config", recipe, "--output_dir", folder, "--resume_from_checkpoint", "auto"]


def print_pretraining(arms: list[str], work_dir: Path) -> None:
    """How each pre-training went, at four of its evaluations."""
    table = Table(box=box.MARKDOWN, pad_edge=False)
    columns = ("step", "eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity")
    for name in ("pre-trained on", *columns):
        table.add_column(name)
    for arm in arms:
        log = work_dir / arm / "pretraining" / "training_log.csv"
        if not log.is_file():
            continue
        rows = pandas.read_csv(log).dropna(subset=["eval_loss"])
        for place in np.unique(np.linspace(0, len(rows) - 1, 4).astype(int)):
            row = rows.iloc[place]
            figures = f"{row[columns[1]]:.3f}", f"{row[columns[2]]:.1%}", f"{row[columns[3]]:.1f}"
            table.add_row(" and ".join(ARMS[arm]), f"{row['step']:.0f}", *figures)
    print_table(table)


def print_cells(cells: list[Cell]) -> None:
    """Dev loss and CER by step, and the test set at the end; means over the seeds, and in brackets the seeds."""
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, []).append(cell)
    logs = {
        arm: [pandas.read_csv(cell.folder / "training_log.csv").dropna(subset=["eval_loss"]) for cell in of_arm]
        for arm, of_arm in arms.items()
    }
    by_step = Table(box=box.MARKDOWN, pad_edge=False)
    by_step.add_column("step")
    for arm in arms:
        by_step.add_column(f"{arm}: dev loss, CER")
    steps = sorted({int(step) for of_arm in logs.values() for log in of_arm for step in log["step"]})
    for step in steps:
        by_step.add_row(str(step), *(describe_step(of_arm, step) for of_arm in logs.values()))
    print_table(by_step)
    at_end = Table(box=box.MARKDOWN, pad_edge=False)
    for name in ("arm", "test CER", "of each seed", "test WER", "of each seed"):
        at_end.add_column(name)
    for arm, of_arm in arms.items():
        results = [json.loads((cell.folder / "train_results.json").read_text()) for cell in of_arm]
        row = []
        for name in ("test_cer", "test_wer"):
            rates = [result[name] for result in results]
            row += [f"{np.mean(rates):.1%}", ", ".join(f"{rate:.1%}" for rate in rates)]
        at_end.add_row(arm, *row)
    print_table(at_end)


def describe_step(logs: list[pandas.DataFrame], step: int) -> str:
    """Means over the seeds that have been evaluated at this step."""
    rows = [log[log["step"] == step] for log in logs]
    rows = [row.iloc[0] for row in rows if len(row)]
    if not rows:
        return ""
    loss, cer = (np.mean([row[name] for row in rows]) for name in ("eval_loss", "eval_cer"))
    return f"{loss:.3f}, {cer:.1%}"


if __name__ == "__main__":
    main()
