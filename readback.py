"""What a run and its evaluations left behind, read back; a piece that is missing or damaged is named, not an error."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from errors import UsageError
from result_layout import COMPARISON_FILE, RESULTS_FILE, UTTERANCES_FILE
from runlog import SAMPLE_COLUMNS, SLICE_COLUMNS, read_log
from shapes import COMPARISON, CONFIG, ENVIRONMENT, PREFLIGHT, RESULTS, TRAIN_RESULTS, Shape, check_shape

Content = TypeVar("Content")
Row = dict[str, Any]

RUN_MARKS = ("training_log.csv", "config.yaml", "train_results.json")


@dataclass
class RunFolder:
    """A run directory of train.py; what is missing is empty, and named in `missing`.

    Attributes:
        folder: the directory.
        log: rows of training_log.csv; empty fields are left out of a row, as are values that are not finite.
        log_time: when the log was last written to, in seconds since the epoch; None without a log.
        results: train_results.json, which only a finished run has.
        config: config.yaml.
        environment: environment.json.
        slices: rows of eval_slices.csv of the last evaluation.
        samples: rows of eval_samples.csv of the last evaluation.
        preflight: preflight.json.
        missing: a line for each piece that is not there.
    """

    folder: Path
    log: list[Row] = field(default_factory=list)
    log_time: float | None = None
    results: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    slices: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    preflight: Row = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self.results)


@dataclass
class ResultsFolder:
    """A folder of evaluate.py; what is missing is empty, and named in `missing`.

    Attributes:
        folder: the directory.
        name: of the evaluation, for a reader.
        results: results.json.
        comparison: comparison.json, which only --compare writes.
        utterances: path of utterances.csv, or None.
        missing: a line for each piece that is not there.
    """

    folder: Path
    name: str
    results: Row = field(default_factory=dict)
    comparison: Row = field(default_factory=dict)
    utterances: Path | None = None
    missing: list[str] = field(default_factory=list)


def find_folders(folder: Path) -> tuple[RunFolder | None, list[ResultsFolder]]:
    """The run and the results that a folder holds: a run with or without results inside, or results alone.

    Results may also lie in folders of their own inside it, and in these those with a language model (lm) and those of
    the model that was compared.

    Raises:
        UsageError: it holds neither.
    """
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {kind}: name a run directory of train.py or a results folder of evaluate.py")
    if (log := folder / "training_log.csv").is_file() and b",contrastive_loss," in log.open("rb").readline():
        raise UsageError(
            f"{folder} is a run of pretrain.py, which wrote no texts to report on: look at training_curve.png in it"
        )
    run = read_run(folder) if any((folder / name).is_file() for name in RUN_MARKS) else None
    inside = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{RESULTS_FILE}"))
    own = [folder] if run is None and _holds_results(folder) else []
    found = [read_results(one, _name_inside(one, folder)) for one in own + inside]
    if run is None and not found:
        raise UsageError(
            f"{folder} is neither a run directory of train.py (training_log.csv, config.yaml) nor a results folder of "
            "evaluate.py (results.json, utterances.csv): name one of these"
        )
    if run is None and not any(one.results or one.utterances for one in found):
        raise UsageError(f"{folder} holds no results of evaluate.py: {'; '.join(found[0].missing)}")
    return run, found


def read_run(folder: Path) -> RunFolder:
    """All pieces of a run directory."""
    run = RunFolder(folder)
    reader = _Reader(folder, run.missing)
    log = reader.read("training_log.csv", _read_log, "no curves and no cost")
    if log is not None:
        run.log, run.log_time = log, (folder / "training_log.csv").stat().st_mtime
    run.config = reader.read("config.yaml", _shaped(yaml.safe_load, CONFIG), "no settings") or {}
    run.environment = reader.read("environment.json", _shaped(json.loads, ENVIRONMENT), "no machine and packages") or {}
    run.samples = reader.read("eval_samples.csv", _newest(SAMPLE_COLUMNS), "no samples of dev") or []
    run.slices = reader.read("eval_slices.csv", _read_slices, "no slices of dev") or []
    run.preflight = _without_unknown(
        reader.read("preflight.json", _shaped(json.loads, PREFLIGHT), "no checks before step 1")
    )
    if (folder / "train_results.json").is_file():
        run.results = _without_unknown(
            reader.read("train_results.json", _shaped(json.loads, TRAIN_RESULTS), "no final figures")
        )
    else:
        run.missing.append(
            "train_results.json is not there: the run is not finished, or was stopped; figures are those so far"
        )
    return run


def read_results(folder: Path, name: str) -> ResultsFolder:
    """All pieces of a results folder."""
    found = ResultsFolder(folder, name)
    reader = _Reader(folder, found.missing)
    remedy = "run evaluate.py again"
    found.results = _without_unknown(
        reader.read(RESULTS_FILE, _shaped(json.loads, RESULTS), f"no intervals, slices and letters; {remedy}")
    )
    if (folder / COMPARISON_FILE).is_file():
        found.comparison = reader.read(COMPARISON_FILE, _shaped(json.loads, COMPARISON), "no comparison") or {}
    if (folder / UTTERANCES_FILE).is_file():
        found.utterances = folder / UTTERANCES_FILE
    else:
        found.missing.append(f"{UTTERANCES_FILE} is not there: no utterances, confusions and durations; {remedy}")
    return found


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, one by one."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _name_inside(folder: Path, outer: Path) -> str:
    """`test/lm` for evaluation_test/lm; of the outer folder itself, its own name."""
    parts = folder.relative_to(outer).parts or (outer.resolve().name,)
    return "/".join(part.removeprefix("evaluation_") for part in parts)


def _holds_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (RESULTS_FILE, UTTERANCES_FILE))


@dataclass
class _Reader:
    """Reads pieces of a folder; what cannot be read becomes a line in `missing`."""

    folder: Path
    missing: list[str]

    def read(self, name: str, parse: Callable[[Path], Content], lost: str) -> Content | None:
        try:
            return parse(self.folder / name)
        except FileNotFoundError:
            self.missing.append(f"{name} is not there: {lost}")
        except (OSError, ValueError, csv.Error, yaml.YAMLError) as error:
            self.missing.append(f"{name} cannot be read ({' '.join(str(error).split())[:200]}): {lost}")
        return None


def _read_log(path: Path) -> list[Row]:
    rows = [
        {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        for row in read_log(path).to_dict("records")
    ]
    if any("step" not in row or "epoch" not in row for row in rows):
        raise ValueError("a row without step or epoch")
    texts = {name for row in rows for name, value in row.items() if isinstance(value, str)} - {"state"}
    if texts:
        raise ValueError(f"text where numbers belong: {', '.join(sorted(texts))}")
    return rows


def _shaped(load: Callable[[str], Any], shape: Shape) -> Callable[[Path], Row]:
    """Reads a JSON or YAML file of this shape."""

    def read(path: Path) -> Row:
        value = load(path.read_text(encoding="utf-8"))
        check_shape(value, shape)
        return value

    return read


def _without_unknown(values: Row | None) -> Row:
    """What is None is not known, as if it were not there."""
    return {name: value for name, value in (values or {}).items() if value is not None}


def _newest(columns: Sequence[str]) -> Callable[[Path], list[Row]]:
    """Reads the rows of the last step from a table with these columns."""

    def read(path: Path) -> list[Row]:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # A run may be in the midst of writing its last row.
        table = csv.DictReader(io.StringIO(whole))
        if lacking := set(columns) - set(table.fieldnames or ()):
            raise ValueError(f"without the columns {', '.join(sorted(lacking))}")
        rows = list(table)
        return [row for row in rows if row["step"] == rows[-1]["step"]]

    return read


def _read_slices(path: Path) -> list[Row]:
    """Rows of the last evaluation, rates and counts as numbers."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    rows = _newest(SLICE_COLUMNS)(path)
    rates = ("wer", "wer_low", "wer_high", "cer")
    return [
        row
        | {name: number(row[name]) for name in rates}
        | {"step": int(row["step"]), "utterances": int(row["utterances"]), "is_small": row["is_small"] == "True"}
        for row in rows
    ]
