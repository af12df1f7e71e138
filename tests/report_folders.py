"""Results, runs and data as evaluate.py, train.py and prepare.py leave them, from texts that a test chooses; and how a
report is read back."""

import csv
import json
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml
from conftest import make_rows, write_part

from audio import SAMPLE_RATE_HZ
from data import ShardDataset
from metrics import score_text
from result_layout import COUNT_COLUMNS
from runlog import SampleTable, SliceTable, TrainingLog

WORDS = ["zero", "one", "two", "three", "four", "ọ́mọ", "ẹ̀kọ́"]
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "]]>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "&lt;b&gt;",
    "a\u2028b\u2029c",
    "</title></style>",
)
HEADINGS = ("id", "reference", "hypothesis", "seconds", "speaker", *COUNT_COLUMNS, "accent")


def write_data(data_dir: Path, num_clips: int, split: str = "test") -> ShardDataset:
    """A prepared split of clips of 0.4 to 1.2 s with the ids u3_0, u3_1, ..."""
    write_part(data_dir / split / "part_1", make_rows(num_clips, 3))
    return ShardDataset(data_dir / split)


def write_results(folder: Path, texts: Sequence[tuple[str, str]], data: ShardDataset, **changes: object) -> dict:
    """A folder of evaluate.py with these (reference, hypothesis); returns its results.json."""
    folder.mkdir(parents=True)
    counts = np.zeros(len(COUNT_COLUMNS), np.int64)
    with (folder / "utterances.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(HEADINGS)
        for row, (reference, hypothesis) in enumerate(texts):
            score = score_text(reference, reference, hypothesis)
            counts += score.counts
            seconds = data.num_samples[row % len(data)] / SAMPLE_RATE_HZ
            own = ("ann", "ben")[row % 2], *score.counts, ("north", "", "<b>south</b>")[row % 3]
            table.writerow((f"u3_{row}", reference, hypothesis, f"{seconds:.3f}", *own))
    words, characters = (dict(zip(("insertions", "deletions", "substitutions", "hits"), map(int, part), strict=True))
                         for part in np.split(counts, 2))  # fmt: skip
    one = {"slice": "accent", "group": "north", "utterances": 40, "wer": 0.4, "wer_low": 0.3, "wer_high": 0.55}
    one |= {"cer": 0.2, "unit": "utterances", "is_small": False}
    results = {
        "model": "runs/x/model",
        "data": str(data.folder),
        "data_fingerprint": data.fingerprint,
        "utterances": len(texts),
        "utterances_of_split": len(texts),
        "seconds": 100.0,
        **{"wer": 0.4321, "wer_low": 0.4, "wer_high": 0.47, "cer": 0.1234, "cer_low": 0.1, "cer_high": 0.15},
        "interval": {"confidence": 0.95, "unit": "utterances", "units": len(texts)},
        "raw_wer": 0.5,
        "words": words,
        "characters": characters,
        **{"sentence_error_rate": 0.6, "sentence_error_rate_low": 0.5, "sentence_error_rate_high": 0.7},
        **{"empty_hypotheses": 0, "frames": 1000, "near_ties": 1, "unknown": "count", "unknown_characters": {"<": 2}},
        "text_rules": {"characters_to_ignore": "", "case": "lower"},
        "slices": [one, one | {"group": "<i>", "wer_low": None, "wer_high": None, "utterances": 1, "is_small": True}],
        "worst_slice": one | {"is_beyond_chance": True},
        "processes": {"mixed_precision": "no", "device": "cpu"},
        "seconds_taken": 2.0,
        "letters": {"a": {"occurrences": 100, "recall": 0.875}, "&": {"occurrences": 3, "recall": 0.0}},
    }
    (folder / "results.json").write_text(json.dumps(results | changes), encoding="utf-8")
    return results | changes


def write_run(folder: Path, data_dir: Path, samples: Sequence[tuple[str, str, str]] = ()) -> None:
    """A run directory at step 20 of 40, still training, with these samples (id, reference, prediction)."""
    folder.mkdir(parents=True)
    log, slices, table = (kind(folder / name) for kind, name in (
        (TrainingLog, "training_log.csv"), (SliceTable, "eval_slices.csv"), (SampleTable, "eval_samples.csv"),
    ))  # fmt: skip
    for step in (10, 20):
        log.append(
            {
                "step": step, "epoch": step / 8, "train_loss": 30 / step, "learning_rate": step / 1e5,
                "grad_norm": 5.0, "samples_per_second": 8.0, "audio_seconds_per_second": 36.0,
                "padding_fraction": 0.025, "peak_memory_mb": 512.0, "elapsed_seconds": 3.0 * step,
                **{"eval_loss": 1.5, "eval_wer": 8 / step, "eval_wer_low": 0.35, "eval_wer_high": 0.95},
                **{"eval_cer": 4 / step, "eval_runtime": 1.5},
            }
        )  # fmt: skip
        row = {"slice": "speaker", "group": "ann", "utterances": 31, "wer": 0.25, "wer_low": 0.125, "wer_high": 0.5}
        slices.append({"step": step} | row | {"cer": 0.0625, "unit": "utterances", "is_small": False})
        table.append(
            *({"step": step, "id": name, "reference": reference, "prediction": prediction}
              for name, reference, prediction in samples)
        )  # fmt: skip
    config = {"data_dir": str(data_dir), "output_dir": str(folder), "max_steps": 40, "eval_split": "dev"}
    config |= {"model_config": {"model_type": "wav2vec2", "conv_dim": [32, 64]}, "learning_rate": 3e-4}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"python": "3.11", "packages": {"torch": "2.9"}, "command": ["train.py", "--seed", "1 <2>"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    finding = {"check": "alignment", "result": "3 clips <br>", "verdict": "warning", "remedy": "listen", "facts": {}}
    (folder / "preflight.json").write_text(json.dumps({"findings": [finding], "left_out": {"too_long": 3}}))


def make_texts(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """References of one to five words, and hypotheses with words replaced, lost and inserted."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        words = generator.choices(WORDS, k=generator.randint(1, 5))
        found = [word if generator.random() < 0.7 else generator.choice([*WORDS, "", "one two"]) for word in words]
        texts.append((" ".join(words), " ".join(filter(None, found))))
    return texts


def blocks(page: str) -> dict[str, object]:
    """The data that the page's script reads, by name."""
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page, re.DOTALL)
    return {name: json.loads(text) for name, text in found}


class Seen(HTMLParser):
    """Elements, attributes and texts, as a browser's parser tells them apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
