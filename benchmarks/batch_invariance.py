"""Does a transcript depend on its neighbours? Ours and transformers' for the same folder, batch by batch.

    python benchmarks/batch_invariance.py --model_name_or_path runs/digits/model --data_dir data/digits data/yo

For each prepared set: WER, hypotheses that differ from those at batch 1, and the largest difference of a logit on valid
frames, at batch 1, 4 and 32, in fp32, bf16 and fp16 (autocast), by scoring.py and by transformers as its CTC example
evaluates (its feature extractor's padding, in the order of the corpus); then evaluate.py with two processes.
Without a model, a group-norm and a layer-norm one of the demo's size are trained on the digits for 300 updates first.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch
import yaml
from transformers import AutoModelForCTC, AutoProcessor
from transformers.utils import logging

from audio import SAMPLE_RATE_HZ
from config import EvaluateConfig
from data import CutSettings, evaluation_loader
from metrics import ErrorCounts, count_word_errors, greedy_decode
from model import num_frames
from model_scorer import ModelScorer
from processes import start_processes

BATCH_SIZES = (1, 4, 32)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
UPDATES = 300
LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True}


@dataclass
class Outcome:
    """Of one tool at one batch size: by row of the set."""

    hypotheses: dict[int, str]
    logits: dict[int, np.ndarray]
    near_ties: int


def main() -> None:
    """Score every combination and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", nargs="*", default=[])
    parser.add_argument("--data_dir", nargs="+", default=["data/digits", "data/yo"])
    parser.add_argument("--split", default="test")
    parser.add_argument("--max_eval_samples", type=int, default=100, help="of each set; fp16 is slow without a GPU")
    arguments = parser.parse_args()
    accelerator = start_processes([], "")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.model_name_or_path or train_models(Path(folder), arguments.data_dir[0])
        print(
            f"{'model and set':<34} {'tool':<13} {'precision':<10} {'batch':>5} {'WER':>8} {'changed':>8} "
            f"{'logits':>9} {'near-ties':>9}"
        )
        differing = [
            compare(str(model), data_dir, arguments, accelerator, Path(folder))
            for model in models
            for data_dir in arguments.data_dir
        ]
    accelerator.end_training()
    if any(differing):
        sys.exit("in fp32 our own texts differ")


def train_models(folder: Path, data_dir: str) -> list[Path]:
    """A group-norm and a layer-norm model on the digits."""
    recipe = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
    models = []
    for name, changes in (("group_norm", {}), ("layer_norm", LAYER_NORM)):
        settings = recipe | {"model_config": recipe["model_config"] | changes, "data_dir": data_dir}
        settings |= {"max_steps": UPDATES, "eval_steps": UPDATES, "save_steps": UPDATES, "do_predict": False}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        print(f"training a {name} model, {UPDATES} updates", file=sys.stderr, flush=True)
        command = [sys.executable, "train.py", "--config", str(path), "--output_dir", str(folder / name)]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        models.append(folder / name / "model")
    return models


def compare(model: str, data_dir: str, arguments: argparse.Namespace, accelerator: object, folder: Path) -> int:
    """The rows of one model on one set; returns how many of our own texts in fp32 differ."""
    differing = 0
    config = EvaluateConfig(model_name_or_path=model, data_dir=data_dir, split=arguments.split)
    scorer = ModelScorer(config, accelerator)
    scorer.model.eval()
    rows = np.arange(len(scorer.dataset))[: arguments.max_eval_samples]
    references = {int(row): scorer.normalizer(scorer.dataset[int(row)].text) for row in rows}
    name = f"{Path(model).parent.name} on {Path(data_dir).name}"
    for tool, score in (("ours", score_with_ours), ("transformers", score_with_transformers)):
        for precision, dtype in PRECISIONS.items():
            alone = None
            for size in BATCH_SIZES:
                with torch.no_grad(), torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
                    outcome = score(scorer, rows, size)
                alone = alone or outcome
                changed = print_row(name, tool, precision, size, outcome, alone, references)
                differing += changed if (tool, precision) == ("ours", "fp32") else 0
    return differing + print_two_processes(name, model, data_dir, arguments.split, folder)


def print_row(
    name: str, tool: str, precision: str, size: int, outcome: Outcome, alone: Outcome, references: dict[int, str]
) -> int:
    """One line of the table; returns how many texts differ from those at batch 1."""
    words = sum((count_word_errors(references[row], text) for row, text in outcome.hypotheses.items()), ErrorCounts())
    changed = sum(outcome.hypotheses[row] != alone.hypotheses[row] for row in references)
    largest = max(float(np.abs(outcome.logits[row] - alone.logits[row]).max(initial=0)) for row in references)
    print(
        f"{name:<34} {tool:<13} {precision:<10} {size:>5} {words.rate:>8.2%} {changed:>4}/{len(references):<3} "
        f"{largest:>9.1e} {outcome.near_ties:>9}",
        flush=True,
    )
    return changed


def score_with_ours(scorer: ModelScorer, rows: np.ndarray, size: int) -> Outcome:
    """By the model, collator and decoder of train.py and evaluate.py."""
    outcome = Outcome({}, {}, 0)
    cut = CutSettings(0, 1, size)
    for batch in evaluation_loader(scorer.dataset, rows, scorer.collate, cut, num_workers=0):
        waveforms_BS = batch.input_values_BS.to(scorer.accelerator.device)
        logits_BTV, frame_lengths_B = scorer.model(waveforms_BS, batch.sample_lengths_B)
        keep(outcome, scorer, batch.rows, logits_BTV.float().cpu(), frame_lengths_B)
    return outcome


def score_with_transformers(scorer: ModelScorer, rows: np.ndarray, size: int) -> Outcome:
    """By the folder as transformers opens it, padded by its own processor."""
    name = scorer.config.model_name_or_path
    device = scorer.accelerator.device
    model, processor = AutoModelForCTC.from_pretrained(name).eval().to(device), AutoProcessor.from_pretrained(name)
    outcome = Outcome({}, {}, 0)
    for chosen in _blocks(rows, size):
        audio = [scorer.dataset[int(row)].audio.astype(np.float32) / 32_768 for row in chosen]
        inputs = processor(audio, sampling_rate=SAMPLE_RATE_HZ, padding=True, return_tensors="pt")
        logits_BTV = model(**inputs.to(device)).logits.float().cpu()
        config = model.config
        lengths_B = torch.tensor([num_frames(len(one), config.conv_kernel, config.conv_stride) for one in audio])
        keep(outcome, scorer, chosen, logits_BTV, lengths_B)
        # What a user reads is decoded with the padding.
        texts = processor.batch_decode(logits_BTV.argmax(-1))
        outcome.hypotheses.update(zip(chosen.tolist(), texts, strict=True))
    return outcome


def keep(
    outcome: Outcome, scorer: ModelScorer, rows: np.ndarray, logits_BTV: torch.Tensor, lengths_B: torch.Tensor
) -> None:
    """The texts and valid logits of a batch."""
    texts = greedy_decode(logits_BTV, lengths_B, scorer.vocabulary)
    top_BT2 = logits_BTV.topk(2, dim=-1).values
    for index, (row, text, length) in enumerate(zip(rows.tolist(), texts, lengths_B.tolist(), strict=True)):
        outcome.hypotheses[row] = text
        outcome.logits[row] = logits_BTV[index, :length].numpy()
        outcome.near_ties += int((top_BT2[index, :length, 0] - top_BT2[index, :length, 1] < 1e-4).sum())


def print_two_processes(name: str, model: str, data_dir: str, split: str, folder: Path) -> int:
    """evaluate.py alone and on two processes, over the whole set; returns how many rows differ."""
    tables = []
    for count in (1, 2):
        out = folder / f"evaluation_{count}"
        launcher = ["accelerate", "launch", "--quiet", *(["--multi_gpu"] if count > 1 else []), "--num_processes"]
        settings = ["--model_name_or_path", model, "--data_dir", data_dir, "--split", split, "--output_dir", str(out)]
        command = [*launcher, str(count), "evaluate.py", *settings]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with (out / "utterances.csv").open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    changed = sum(one != two for one, two in zip(*tables, strict=True))
    print(f"{name:<34} evaluate.py with 2 processes: {changed} of {len(tables[0])} rows differ from 1", flush=True)
    return changed


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


if __name__ == "__main__":
    main()
