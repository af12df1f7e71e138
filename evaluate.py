"""Score a model on a prepared split: error rates with their intervals, whom it fails, and how another model differs.

    python evaluate.py --model_name_or_path runs/en/model --data_dir data/en --split test
    python evaluate.py ... --slices gender age accents duration
    python evaluate.py ... --lm lm                                    (a folder that decoding.py build-lm wrote)
    python evaluate.py ... --compare facebook/wav2vec2-large-960h     (or a folder that evaluate.py wrote)
    python evaluate.py ... --rank_train    (the training clips, the most suspect first, for train.py --prune_list)
    accelerate launch --multi_gpu --num_processes 2 evaluate.py ...   (each utterance is scored once, on one of them)

Writes results.json and utterances.csv (id, reference, hypothesis, errors and the corpus' own columns) into
--output_dir. Precision belongs to the launcher; without one everything is in fp32, where no text depends on the batch
size or on the number of processes.
"""

from errors import UsageError, exit_status

# isort: split

import allocator  # noqa: F401 - before torch
import collector  # before torch
import launched  # noqa: F401 - before torch

# isort: split

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from atomic import nearest_existing, reporting_disk_errors, write_atomically
from audio import SAMPLE_RATE_HZ
from cache import FactCache
from comparison import compare
from config import EvaluateConfig, parse_arguments
from data import Batch, ShardDataset, has_utterances
from hosts import check_hosts_agree, check_same
from intervals import CONFIDENCE, share_of_units
from letters import describe_letters, find_rare
from metrics import TextScore
from model_scorer import ModelScorer
from pretrained import find_checkpoint_folder
from processes import RankStatus, describe_processes, main_first, naming_lost_processes, start_processes
from progress import say
from ranking import RankingScorer, describe_ranking, rank, ranking_facts, write_ranking
from recovery import failing_by_name, release_memory
from result_layout import (
    COMPARISON_FILE,
    DROPS_FILE,
    RANKING_FACTS_FILE,
    RANKING_FILE,
    RESULTS_FILE,
    UTTERANCES_FILE,
)
from results import (
    TextSpool,
    Utterances,
    print_results,
    read_utterances,
    write_drops,
    write_results,
    write_utterances,
)
from runlog import REPORT_FILE, report_line
from scoring import Evaluation, evaluate, named_limits
from side_by_side import BeamTexts, GreedyTexts, describe_reading, print_error_classes
from slices import Breakdown, Trained, describe_slice, draw_stratified, error_intervals, worst_slice
from stopping import end_loaders
from text import TextNormalizer, describe_rules
from transcripts import measure_letters

collector.wake()

COMPARED_FOLDER, LM_FOLDER = "compared", "lm"
OUT_OF_MEMORY_REMEDY = "lower --per_device_eval_batch_size, or set --max_batch_seconds"


def main() -> None:
    """Score, compare, write, say."""
    config = parse_arguments(EvaluateConfig, sys.argv[1:], __doc__)
    folder = choose_results_folder(config)
    other = read_compared(config, folder)
    accelerator = start_processes([], str(folder), config.ddp_timeout)
    try:
        with naming_lost_processes():
            status = RankStatus(accelerator, config.ddp_timeout)
            check_hosts_agree(status, config)
            named = {"what --compare names": "a model" if other is None else "results"}
            check_same(status, named, "put those results where every host sees them")
            if config.rank_train:
                rank_train(config, folder, accelerator)
            else:
                score_models(config, folder, other, accelerator)
    finally:
        end_loaders()
        accelerator.end_training()


def score_models(config: EvaluateConfig, folder: Path, other: Utterances | None, accelerator: Accelerator) -> None:
    """The model, and the one that it is compared with.

    Args:
        config: the settings.
        folder: for the results.
        other: results to compare with.
        accelerator: of this process.
    """
    if config.compare and other is None:
        with main_first(accelerator):
            find_checkpoint_folder(config.compare)
    rules = score_and_report(config, folder, accelerator)
    if config.compare and other is None:
        release_memory()
        # Both are judged by the same texts; the case is each vocabulary's own.
        rules = {"characters_to_ignore": rules["characters_to_ignore"]}
        # As the model itself hears, since a language model's weights are those of one recogniser.
        compared = replace(config, model_name_or_path=config.compare, lm=None, **rules)
        score_and_report(compared, folder / COMPARED_FOLDER, accelerator)
    if config.compare and accelerator.is_main_process:
        other = read_utterances(folder / COMPARED_FOLDER) if other is None else other
        report_comparison(config, folder, other)
    if accelerator.is_main_process:
        say(report_line(folder), sys.stdout)


def read_compared(config: EvaluateConfig, folder: Path) -> Utterances | None:
    """The results that --compare names; None where it names a model, which is scored as well.

    Raises:
        UsageError: they are damaged, or lie where the new ones go.
    """
    other = Path(config.compare or "")
    if not config.compare or not (other / UTTERANCES_FILE).is_file():
        return None
    if other.resolve() in (folder.resolve(), (folder / COMPARED_FOLDER).resolve()):
        raise UsageError(f"--compare {other}: the new results would replace it; name another --output_dir")
    return read_utterances(other)


def choose_results_folder(config: EvaluateConfig) -> Path:
    """--output_dir; else beside a model folder, else here.

    Raises:
        UsageError: it cannot be written, or holds something else.
    """
    model = Path(config.model_name_or_path)
    beside = model.parent if model.is_dir() else Path()
    name = "ranking" if config.rank_train else f"evaluation_{config.split}"
    folder = Path(config.output_dir) if config.output_dir else beside / name
    known = {RESULTS_FILE, UTTERANCES_FILE, DROPS_FILE, COMPARED_FOLDER, LM_FOLDER, COMPARISON_FILE, REPORT_FILE}
    if config.rank_train:
        known = {RANKING_FILE, RANKING_FACTS_FILE}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the results with --output_dir")
    foreign = sorted({path.name for path in folder.iterdir()} - known) if folder.is_dir() else []
    if foreign:
        raise UsageError(f"{folder} holds {', '.join(foreign[:3])}: name a folder for the results with --output_dir")
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UsageError(f"{existing} is a file: name a folder for the results with --output_dir")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{existing} cannot be written to: name a folder for the results with --output_dir")
    return folder


def make_folder(folder: Path) -> None:
    """Make sure, before anything is scored, that results can be written there.

    Raises:
        UsageError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): name another --output_dir") from error


def clear_results(folder: Path) -> None:
    """What an earlier evaluation left there does not belong to the new one; kept until that has something to write.

    The results say that a folder is complete: they go first and come last.
    """
    with reporting_disk_errors(folder):
        for name in (RESULTS_FILE, COMPARISON_FILE, UTTERANCES_FILE, DROPS_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in (COMPARED_FOLDER, LM_FOLDER):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)


def score_and_report(config: EvaluateConfig, folder: Path, accelerator: Accelerator) -> dict[str, object]:
    """One model: score it, write its folder, print its screen. Returns the text rules that it was scored by."""
    scorer = ModelScorer(config, accelerator, keeps_log_probs=config.lm is not None)
    rows, dropped = scorer.choose_rows()
    trained, known = find_trained(config)
    with main_first(accelerator):  # The others find in the cache what the first process has found.
        in_training = count_training_letters(config, scorer.normalizer)
    if config.max_eval_samples is not None and config.max_eval_samples < len(rows):
        rows = draw_stratified(scorer.dataset, rows, trained, config.max_eval_samples, config.seed)
    breakdown = Breakdown.of(scorer.dataset, rows, scorer.texts.num_labels[rows], trained, config.slices)
    scorer.status.by_first(accelerator.is_main_process, lambda: make_folder(folder))
    readings = [GreedyTexts(scorer)]
    if config.lm is not None:
        readings.append(BeamTexts.of(config, scorer, rows))
    with scorer.stop, failing_by_name(OUT_OF_MEMORY_REMEDY), contextlib.ExitStack() as stack:
        for reading in readings:
            stack.enter_context(reading)

        def see(batch: Batch, texts: list[TextScore]) -> None:
            for reading in readings:
                reading.see(batch, texts)

        started_at = time.monotonic()
        evaluation = evaluate(scorer, scorer.dataset, rows, f"scoring {config.split}", see)
        outcomes = [reading.finish(evaluation) for reading in readings]
        seconds = time.monotonic() - started_at
        results = [
            make_results(scorer, outcome.evaluation, breakdown, seconds)
            | {"known_of_training": known}
            | {"letters": describe_letters(outcome.evaluation.letters, in_training)}
            | {"rare_in_training": find_rare(in_training or {})}
            | outcome.facts
            for outcome in outcomes
        ]

        def write() -> None:
            clear_results(folder)
            # The folder itself is complete when those within it are.
            for place, outcome, own in reversed([*zip((folder, folder / LM_FOLDER), outcomes, results, strict=False)]):
                place.mkdir(exist_ok=True)
                write_utterances(place / UTTERANCES_FILE, scorer.dataset, outcome.evaluation, outcome.texts)
                write_drops(place / DROPS_FILE, config.split, dropped)
                write_results(place, own)
            print_results(results[0])
            say(f"written to {folder}: {RESULTS_FILE}, {UTTERANCES_FILE}", sys.stdout)
            if config.lm is not None:
                report_language_model(folder, results[1])

        scorer.status.by_first(accelerator.is_main_process, write)
    return scorer.rules


def report_language_model(folder: Path, results: dict[str, object]) -> None:
    """Greedy and with the language model side by side, on the screen and in lm/comparison.json."""
    found = compare(read_utterances(folder / LM_FOLDER), read_utterances(folder))
    facts = found.facts() | {"other_model": str(folder), "error_classes": results["error_classes"]}
    write_atomically(folder / LM_FOLDER / COMPARISON_FILE, json.dumps(facts, indent=1))
    say("\n".join((*describe_reading(results), *found.lines("greedy", "with the LM"))), sys.stdout)
    print_error_classes(results["error_classes"])
    say(f"written to {folder / LM_FOLDER}: the same files for these texts, {COMPARISON_FILE}", sys.stdout)


def rank_train(config: EvaluateConfig, folder: Path, accelerator: Accelerator) -> None:
    """All training clips, each scored by one model: train_ranking.csv, train_ranking.json and the screen.

    Raises:
        UsageError: --other_half and the model are not of runs on this very data.
    """
    scorer = RankingScorer(config, accelerator)
    heard, is_of_other = divide_among_models(config, scorer.dataset)
    scorer.status.by_first(accelerator.is_main_process, lambda: make_folder(folder))
    with TextSpool() as spool:
        with scorer.stop, failing_by_name(OUT_OF_MEMORY_REMEDY):
            measures = scorer.measure(np.flatnonzero(~is_of_other), spool)
        if is_of_other.any():
            release_memory()
            other = RankingScorer(replace(config, model_name_or_path=config.other_half), accelerator)
            with other.stop, failing_by_name(OUT_OF_MEMORY_REMEDY):
                measures = measures.filled_by(other.measure(np.flatnonzero(is_of_other), spool))
        spool.collect(accelerator, scorer.status)
        ranking = rank(measures, scorer.speaking, heard)

        def write() -> None:
            models = {"model": config.model_name_or_path, "other_half": config.other_half}
            facts = models | {"data_fingerprint": scorer.dataset.fingerprint} | ranking_facts(ranking)
            (folder / RANKING_FACTS_FILE).unlink(missing_ok=True)  # It says that the table is complete.
            write_ranking(folder / RANKING_FILE, scorer.dataset, ranking, spool)
            write_atomically(folder / RANKING_FACTS_FILE, json.dumps(facts, indent=1))
            say("\n".join(describe_ranking(facts, folder / RANKING_FILE)), sys.stdout)
            say(f"written to {folder}: {RANKING_FILE}, {RANKING_FACTS_FILE}", sys.stdout)

        scorer.status.by_first(accelerator.is_main_process, write)


def divide_among_models(config: EvaluateConfig, dataset: ShardDataset) -> tuple[np.ndarray | None, np.ndarray]:
    """Whether a clip is judged by a model that heard it (None: not known), and whether by --other_half, bool [N] each.

    Raises:
        UsageError: --other_half, and what the two models heard is not known.
    """
    heard = find_heard(config.model_name_or_path, dataset)
    if config.other_half is None:
        return heard, np.zeros(len(dataset), bool)
    heard_by_other = find_heard(config.other_half, dataset)
    if heard is None or heard_by_other is None:
        raise UsageError(
            f"--other_half needs two models of runs on {config.data_dir}: which clips they heard is read from the "
            "environment.json and drop_list.csv beside them"
        )
    return heard & heard_by_other, heard & ~heard_by_other


def find_trained(config: EvaluateConfig) -> tuple[Trained | None, str]:
    """Voices and sentences that the model has heard, and how that is known.

    "run": the model lies in the run directory that trained it on this very data, beside the list of clips left out.
    "data": all of the data's training split, which it may not have heard. "": the data has no training split.
    """
    train = Path(config.data_dir) / "train"
    if config.split == "train" or not has_utterances(train):
        return None, ""
    dataset = ShardDataset(train)
    heard = find_heard(config.model_name_or_path, dataset)
    return (Trained.of(dataset), "data") if heard is None else (Trained.of(dataset, heard), "run")


def count_training_letters(config: EvaluateConfig, normalizer: TextNormalizer) -> dict[str, int] | None:
    """How often each letter stands in the training split of the data, by the same rules; None without one."""
    train = Path(config.data_dir) / "train"
    if not has_utterances(train):
        return None
    dataset = ShardDataset(train)
    cache = FactCache(Path(config.data_dir))
    return measure_letters(dataset, normalizer, cache)


def find_heard(model: str, dataset: ShardDataset) -> np.ndarray | None:
    """Which training clips a model was trained on, bool [N]; None where it lies in no run on this very data."""
    run = Path(model).parent
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((run / "environment.json").read_text())["data_fingerprint"] == dataset.fingerprint:
            # The list is that of the settings that a resume changed to; what was heard before them it does not say.
            results = run / "train_results.json"
            if results.is_file() and "resumed_anyway" in json.loads(results.read_text()):
                return None
            with (run / "drop_list.csv").open(encoding="utf-8", newline="") as file:
                dropped = {row["id"] for row in csv.DictReader(file)}
            return np.fromiter((name not in dropped for name in dataset.column("id")), bool)
    return None


def make_results(
    scorer: ModelScorer, evaluation: Evaluation, breakdown: Breakdown, seconds: float
) -> dict[str, object]:
    """All figures of one evaluation, for results.json and the screen."""
    config, score, coverage = scorer.config, evaluation.score, scorer.texts.coverage
    slices = breakdown.score(evaluation.counts)
    worst = worst_slice(slices, score.wer)
    sentences = share_of_units(evaluation.counts[:, :3].any(1), breakdown.speakers)
    words, characters = error_intervals(evaluation.counts, breakdown.speakers)
    return {
        "model": config.model_name_or_path,
        **({} if config.target_lang is None else {"target_lang": config.target_lang}),
        "data": f"{config.data_dir}/{config.split}",
        "data_fingerprint": scorer.dataset.fingerprint,
        "utterances": score.utterances,
        "utterances_of_split": len(scorer.dataset),
        "seconds": float(scorer.dataset.num_samples[evaluation.rows].sum() / SAMPLE_RATE_HZ),
        **named_limits("wer", words),
        **named_limits("cer", characters),
        "interval": {"confidence": CONFIDENCE, "unit": words.unit, "units": words.units},
        "raw_wer": score.raw_wer,
        "words": asdict(score.words),
        "characters": asdict(score.characters),
        **named_limits("sentence_error_rate", sentences),
        "empty_hypotheses": score.empty_hypotheses,
        "frames": score.frames,
        "near_ties": score.near_ties,
        "unknown": config.unknown,
        "unknown_characters": dict(coverage.unknown.most_common()),
        "text_rules": describe_rules(scorer.rules),
        "slices": list(map(describe_slice, slices)),
        "worst_slice": None if worst is None else describe_slice(worst[0]) | {"is_beyond_chance": bool(worst[1])},
        "processes": describe_processes(scorer.accelerator),
        "seconds_taken": seconds,
    }


def report_comparison(config: EvaluateConfig, folder: Path, other: Utterances) -> None:
    """Both results side by side, on the screen and in comparison.json."""
    found = compare(read_utterances(folder), other)
    write_atomically(folder / COMPARISON_FILE, json.dumps(found.facts() | {"other_model": config.compare}, indent=1))
    say("\n".join(found.lines(config.compare, config.model_name_or_path)), sys.stdout)


if __name__ == "__main__":
    sys.exit(exit_status(main))
