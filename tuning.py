"""Weights of a language model, found on a dev split: the recogniser listens once, the beam search many times.

T: frames, V: outputs of the recogniser's head.
"""

import array
import io
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from atomic import reporting_disk_errors, write_atomically
from audio import SAMPLE_RATE_HZ
from config import EvaluateConfig, TuneConfig
from data import Batch
from decoding import BeamSettings, check_installed
from decoding_pool import DecodingPool, choose_num_workers
from errors import UsageError
from language_model import TUNING_FILE, LanguageModel, open_language_model
from metrics import ErrorCounts, TextScore, count_character_errors, count_word_errors
from model_scorer import ModelScorer
from pretrained import find_checkpoint_folder, weights_checksum
from processes import start_processes
from progress import Progress
from recovery import failing_by_name
from scoring import Evaluation, evaluate
from slices import draw_stratified
from stopping import end_loaders
from text import Vocabulary

# The first look, and the step of the search that begins at its best point: weight, score.
COARSE_WEIGHTS, COARSE_SCORES = (0.5, 1.0, 2.0, 3.0, 4.5), (-2.0, 0.0, 2.0)
FIRST_STEP = (0.75, 1.0)
HALVINGS = 2
MAX_WEIGHT = 10.0
OUT_OF_MEMORY_REMEDY = "lower --per_device_eval_batch_size"

Point = tuple[float, float]


class LogProbSpool:
    """Log-probabilities of a split on the disk, with the texts that they should become; a context manager."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the spool
        self._places = array.array("q")
        self._shapes: list[tuple[int, int]] = []
        self.references: list[str] = []

    def __enter__(self) -> "LogProbSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, log_probs_TV: np.ndarray, reference: str) -> None:
        """Keep one utterance, float32 [T, V]."""
        self._places.append(self._file.seek(0, io.SEEK_END))
        self._shapes.append(log_probs_TV.shape)
        self.references.append(reference)
        with reporting_disk_errors(Path(tempfile.gettempdir()), log_probs_TV.nbytes):
            self._file.write(np.ascontiguousarray(log_probs_TV, np.float32))

    def __iter__(self) -> Iterator[np.ndarray]:
        for place, shape in zip(self._places, self._shapes, strict=True):
            self._file.seek(place)
            data = self._file.read(4 * shape[0] * shape[1])
            yield np.frombuffer(bytearray(data), np.float32).reshape(shape)


@dataclass
class Search:
    """Coarse to fine over (weight, score): a grid, then steps to the best neighbour, halved where there is none.

    Attributes:
        errors: of a point: words first, then characters; less is better.
        tried: each point that was looked at.
    """

    errors: Callable[[Point], tuple[int, int]]
    tried: dict[Point, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> Point:
        """The best point; of equals the one that was looked at first."""
        self._look(itertools.product(COARSE_WEIGHTS, COARSE_SCORES))
        step, halvings = FIRST_STEP, 0
        while halvings <= HALVINGS:
            centre = self.best
            moves = ((-step[0], 0.0), (step[0], 0.0), (0.0, -step[1]), (0.0, step[1]))
            around = [(round(centre[0] + dx, 4), round(centre[1] + dy, 4)) for dx, dy in moves]
            self._look(point for point in around if 0 <= point[0] <= MAX_WEIGHT)
            if self.best == centre:
                step, halvings = (step[0] / 2, step[1] / 2), halvings + 1
        return self.best

    @property
    def best(self) -> Point:
        """Of those tried."""
        return min(self.tried, key=self.tried.__getitem__)

    def _look(self, points: Iterator[Point] | Sequence[Point]) -> None:
        for point in points:
            if point not in self.tried:
                self.tried[point] = self.errors(point)


def tune(config: TuneConfig) -> None:
    """Search, write tuning.json, say what was found.

    Raises:
        UsageError: the model or the language model cannot be used, or several processes were launched.
    """
    check_installed()
    model = open_language_model(Path(config.lm))
    if not os.access(model.folder, os.W_OK):
        raise UsageError(f"--lm {config.lm} cannot be written to: copy the folder")
    accelerator = start_processes([], config.lm)
    try:
        if accelerator.num_processes > 1:
            raise UsageError("tune is one process of its own and starts others to decode: python decoding.py tune ...")
        settings = EvaluateConfig(
            model_name_or_path=config.model_name_or_path,
            data_dir=config.data_dir,
            split=config.split,
            language=config.language,
            per_device_eval_batch_size=config.per_device_eval_batch_size,
            seed=config.seed,
        )
        scorer = ModelScorer(settings, accelerator, keeps_log_probs=True)
        with LogProbSpool() as spool, scorer.stop, failing_by_name(OUT_OF_MEMORY_REMEDY):
            evaluation = listen(scorer, config, spool)
            search, best = find_weights(config, model, scorer.vocabulary, spool)
        facts = describe(config, model, search, best, evaluation, scorer)
        write_atomically(model.folder / TUNING_FILE, json.dumps(facts, indent=1, ensure_ascii=False))
        print("\n".join(lines(facts, model)), flush=True)
    finally:
        end_loaders()
        accelerator.end_training()


def listen(scorer: ModelScorer, config: TuneConfig, spool: LogProbSpool) -> Evaluation:
    """One pass of the recogniser; its log-probabilities go to the disk."""
    rows = np.arange(len(scorer.dataset))
    if config.max_eval_samples < len(rows):
        rows = draw_stratified(scorer.dataset, rows, None, config.max_eval_samples, config.seed)

    def see(batch: Batch, _: list[TextScore]) -> None:
        for row, reference in zip(batch.rows.tolist(), batch.texts, strict=True):
            spool.add(scorer.take_log_probs(row), reference)

    return evaluate(scorer, scorer.dataset, rows, f"listening to {config.split}", see)


def find_weights(
    config: TuneConfig, model: LanguageModel, vocabulary: Vocabulary, spool: LogProbSpool
) -> tuple[Search, Point]:
    """The search, finished, and its best point."""
    pool: DecodingPool[str] = DecodingPool(
        vocabulary, model, BeamSettings(beam_size=config.beam_size), choose_num_workers(config.beam_workers)
    )
    with Progress("tuning", 0, "settings") as progress, pool:

        def errors(point: Point) -> tuple[int, int]:
            pool.settings = BeamSettings(*point, beam_size=config.beam_size)
            words, characters = count_errors(pool, spool)
            progress.total = len(search.tried) + 1  # How many there will be shows itself on the way.
            progress.advance(note=f"weight {point[0]:g}, score {point[1]:+g}: WER {words.rate:.2%}")
            return words.errors, characters.errors

        search = Search(errors)
        return search, search.run()


def count_errors(pool: DecodingPool[str], spool: LogProbSpool) -> tuple[ErrorCounts, ErrorCounts]:
    """Word and character errors of the beam search over all utterances."""
    words, characters = ErrorCounts(), ErrorCounts()
    for finished in pool.decode(zip(spool.references, spool, strict=True)):
        words += count_word_errors(finished.item, finished.decoded.text)
        characters += count_character_errors(finished.item, finished.decoded.text)
    return words, characters


def describe(
    config: TuneConfig, model: LanguageModel, search: Search, best: Point, evaluation: Evaluation, scorer: ModelScorer
) -> dict[str, object]:
    """For tuning.json."""
    score, (words, characters) = evaluation.score, search.tried[best]
    return asdict(BeamSettings(*best, beam_size=config.beam_size)) | {
        "model": config.model_name_or_path,
        "model_sha256": weights_checksum(find_checkpoint_folder(config.model_name_or_path)),
        "lm_sha256": model.sha256,
        "data": f"{config.data_dir}/{config.split}",
        "data_fingerprint": scorer.dataset.fingerprint,
        "utterances": score.utterances,
        "seconds": float(scorer.dataset.num_samples[evaluation.rows].sum() / SAMPLE_RATE_HZ),
        "greedy": {"wer": score.wer, "cer": score.cer},
        "with_lm": {
            "wer": words / max(score.words.reference_length, 1),
            "cer": characters / max(score.characters.reference_length, 1),
        },
        "tried": [
            {"lm_weight": weight, "word_score": bonus, "word_errors": errors[0], "character_errors": errors[1]}
            for (weight, bonus), errors in search.tried.items()
        ],
    }


def lines(facts: dict[str, object], model: LanguageModel) -> list[str]:
    """The screen."""
    greedy, with_lm = facts["greedy"], facts["with_lm"]
    helps = with_lm["wer"] < greedy["wer"]
    advice = [] if helps else ["  it does not help: give build-lm more text, or --unit character"]
    return [
        f"tuned on {facts['utterances']:,} utterances of {facts['data']}, {len(facts['tried'])} settings",
        f"  greedy      WER {greedy['wer']:.2%}   CER {greedy['cer']:.2%}",
        f"  with the LM WER {with_lm['wer']:.2%}   CER {with_lm['cer']:.2%}   (the best of them on this very split: "
        "judge by another)",
        f"  --lm_weight {facts['lm_weight']:g} --word_score {facts['word_score']:g}, written to "
        f"{model.folder / TUNING_FILE}",
        *advice,
    ]
