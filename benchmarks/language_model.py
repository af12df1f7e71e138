"""What a language model does to the word error rate on real speech: greedy, a beam alone, words, characters.

    python benchmarks/language_model.py --model_name_or_path runs/yoruba/model --data_dir data/yo --text train.tsv

Builds a word and a character model of the texts (as decoding.py build-lm), finds their weights on dev (as tune), and
decodes the test split. Prints WER and CER, seconds of audio per second of one core, classes of errors against greedy,
and how two processes and two threads compare with one.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
from rich import box
from rich.table import Table

from audio import SAMPLE_RATE_HZ
from config import BuildLMConfig, EvaluateConfig, TuneConfig
from decoding import BeamDecoder, BeamSettings
from decoding_pool import DecodingPool, choose_num_workers
from error_classes import ErrorClasses
from intervals import rate_difference
from language_model import LanguageModel, open_language_model
from lm_building import build_language_model, describe_build
from metrics import ErrorCounts, count_character_errors, count_word_errors, greedy_decode
from model_scorer import ModelScorer
from processes import start_processes
from progress import print_table
from scoring import evaluate
from side_by_side import print_error_classes
from slices import draw_stratified
from text import Vocabulary
from tuning import COARSE_SCORES, LogProbSpool, Search, count_errors, find_weights


@dataclass
class Row:
    """One way of decoding the test split."""

    name: str
    settings: BeamSettings | None
    hypotheses: list[str]
    seconds: float | None


def main() -> None:
    """Build, tune, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--max_dev_samples", type=int, default=500, help="to find the weights on")
    parser.add_argument("--beam_size", type=int, default=50)
    arguments = parser.parse_args()
    accelerator = start_processes([], "")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        models = {unit: build(arguments, unit, Path(name) / unit) for unit in ("word", "character")}
        spools = {split: stack.enter_context(LogProbSpool()) for split in ("dev", "test")}
        for split, spool in spools.items():
            vocabulary, audio_seconds, forward_seconds = listen(arguments, split, spool, accelerator)
        tune_config = TuneConfig(arguments.model_name_or_path, arguments.data_dir, name, beam_size=arguments.beam_size)
        rows = list(decode_all(vocabulary, models, spools, tune_config))
        print_rows(rows, spools["test"].references, audio_seconds, forward_seconds)
        for row in rows[2:]:
            classes = ErrorClasses()
            for texts in zip(spools["test"].references, rows[0].hypotheses, row.hypotheses, strict=True):
                classes.add(*texts)
            print(row.name)
            print_error_classes(classes.facts())
        print_ways(vocabulary, models["word"], spools["dev"], arguments.beam_size)
    accelerator.end_training()


def build(arguments: argparse.Namespace, unit: str, out: Path) -> LanguageModel:
    """As decoding.py build-lm."""
    config = BuildLMConfig(
        arguments.text, arguments.data_dir, str(out), unit, model_name_or_path=arguments.model_name_or_path
    )
    print("\n".join(describe_build(out, build_language_model(config))), flush=True)
    return open_language_model(out)


def listen(
    arguments: argparse.Namespace, split: str, spool: LogProbSpool, accelerator: object
) -> tuple[Vocabulary, float, float]:
    """One pass of the recogniser over a split: its vocabulary, seconds of audio, seconds that it took."""
    config = EvaluateConfig(arguments.model_name_or_path, arguments.data_dir, split)
    scorer = ModelScorer(config, accelerator, keeps_log_probs=True)

    def see(batch: object, _: object) -> None:
        for row, reference in zip(batch.rows.tolist(), batch.texts, strict=True):
            spool.add(scorer.take_log_probs(row), reference)

    rows = np.arange(len(scorer.dataset))
    if split == "dev" and arguments.max_dev_samples < len(rows):
        rows = draw_stratified(scorer.dataset, rows, None, arguments.max_dev_samples, config.seed)
    evaluate(scorer, scorer.dataset, rows, f"listening to {split}", see)
    return scorer.vocabulary, float(scorer.dataset.num_samples.sum() / SAMPLE_RATE_HZ), scorer.forward_seconds


def decode_all(
    vocabulary: Vocabulary, models: dict[str, LanguageModel], spools: dict[str, LogProbSpool], config: TuneConfig
) -> Iterator[Row]:
    """Greedy first; each language model with the weights that are best on dev."""
    import torch

    greedy = [
        greedy_decode(torch.from_numpy(log_probs_TV)[None], torch.tensor([len(log_probs_TV)]), vocabulary)[0]
        for log_probs_TV in spools["test"]
    ]
    yield Row("greedy", None, greedy, None)
    plain = BeamSettings(0.0, 0.0, config.beam_size)
    yield decode("beam, no language model", vocabulary, None, plain, spools["test"])
    errors = {}
    with DecodingPool(vocabulary, models["word"], plain, choose_num_workers(-1)) as pool:
        for score in COARSE_SCORES:
            pool.settings = replace(plain, word_score=score)
            errors[pool.settings] = count_errors(pool, spools["dev"])[0].errors
    best = min(errors, key=errors.__getitem__)
    yield decode("list of words, weight 0", vocabulary, models["word"], best, spools["test"])
    for unit, model in models.items():
        search: Search
        search, (weight, score) = find_weights(config, model, vocabulary, spools["dev"])
        settings = BeamSettings(weight, score, config.beam_size)
        name = f"{unit}s, order {model.order} ({len(search.tried)} settings tried)"
        yield decode(name, vocabulary, model, settings, spools["test"])


def decode(
    name: str, vocabulary: Vocabulary, model: LanguageModel | None, settings: BeamSettings, spool: LogProbSpool
) -> Row:
    """The test split, one way."""
    with DecodingPool(vocabulary, model, settings, choose_num_workers(-1)) as pool:
        finished = list(pool.decode(enumerate(spool)))
    return Row(name, settings, [one.decoded.text for one in finished], sum(one.seconds for one in finished))


def print_rows(rows: list[Row], references: list[str], audio_seconds: float, forward_seconds: float) -> None:
    """The table; differences are to greedy, with their 95 % intervals over utterances."""
    table = Table("decoding", "weight, score", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("WER", "difference to greedy", "CER", "audio s per s of a core"):
        table.add_column(name, justify="right")
    lengths = np.array([len(reference.split()) for reference in references])
    errors = {
        row.name: np.array([count_word_errors(*pair).errors for pair in zip(references, row.hypotheses, strict=True)])
        for row in rows
    }
    for row in rows:
        characters = sum(
            (count_character_errors(*pair) for pair in zip(references, row.hypotheses, strict=True)), ErrorCounts()
        )
        weights = "" if row.settings is None else f"{row.settings.lm_weight:g}, {row.settings.word_score:g}"
        difference = rate_difference(errors["greedy"], errors[row.name], lengths).interval
        speed = "" if row.seconds is None else f"{audio_seconds / row.seconds:,.0f}"
        rate = errors[row.name].sum() / lengths.sum()
        shown = "" if row.settings is None else str(difference)
        table.add_row(row.name, weights, f"{rate:.2%}", shown, f"{characters.rate:.2%}", speed)
    print_table(table)
    print(
        f"{len(references)} utterances, {audio_seconds:.0f} s; the recogniser: {audio_seconds / forward_seconds:.0f} s "
        "of audio per second"
    )


def print_ways(vocabulary: Vocabulary, model: LanguageModel, spool: LogProbSpool, beam_size: int) -> None:
    """Wall-clock seconds for the same work: here, in two threads, in one process, in two."""
    settings, utterances = BeamSettings(1.0, 0.0, beam_size), list(spool)
    decoders = [BeamDecoder(vocabulary, model, settings) for _ in range(2)]
    seconds = {}
    started_at = time.monotonic()
    decoders[0](utterances)
    seconds["one thread"] = time.monotonic() - started_at
    with ThreadPoolExecutor(2) as pool:
        started_at = time.monotonic()
        list(pool.map(lambda decoder, part: decoder(part), decoders, (utterances[::2], utterances[1::2])))
        seconds["two threads"] = time.monotonic() - started_at
    for workers in (1, 2):
        with DecodingPool(vocabulary, model, settings, workers) as pool:
            list(pool.decode(enumerate(utterances[:2])))  # The processes have started.
            started_at = time.monotonic()
            list(pool.decode(enumerate(utterances)))
            seconds[f"{workers} process{'es' if workers > 1 else ''}"] = time.monotonic() - started_at
    ways = (f"{name} {value:.2f} s ({seconds['one thread'] / value:.2f}x)" for name, value in seconds.items())
    print(f"the same {len(utterances)} utterances: " + ", ".join(ways))


if __name__ == "__main__":
    main()
