"""What an evaluation leaves behind: `utterances.csv`, a row per utterance, and `results.json`.

N: utterances of the evaluation.
"""

import array
import csv
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich import box
from rich.table import Table
from rich.text import Text

from atomic import reporting_disk_errors, write_atomically, write_table
from audio import SAMPLE_RATE_HZ
from corpora import DROP_COLUMNS
from data import ShardDataset
from errors import UsageError
from letters import LETTERS_SHOWN, letter_lines
from processes import RankStatus
from progress import print_table, say
from result_layout import COUNT_COLUMNS, DROPS_FILE, RESULTS_FILE, TEXT_COLUMNS, UTTERANCES_FILE
from scoring import Evaluation, describe_limits
from slices import OWN_COLUMNS, corpus_name

# Texts that travel from rank to rank at a time.
TEXTS_PER_GATHER = 10_000


class TextSpool:
    """Texts of each row on the disk until all are there, since they come longest clip first: reference, hypothesis."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the spool
        self._rows, self._places = array.array("q"), array.array("q")

    def __enter__(self) -> "TextSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: int, *texts: str) -> None:
        """Keep one utterance's texts."""
        self._rows.append(row)
        self._places.append(self._file.seek(0, io.SEEK_END))
        data = json.dumps(texts).encode() + b"\n"
        with reporting_disk_errors(Path(tempfile.gettempdir()), len(data)):
            self._file.write(data)

    def collect(self, accelerator: Accelerator, status: RankStatus) -> None:
        """Bring the texts of all ranks to the first one."""
        if accelerator.num_processes == 1:
            return
        own = iter(list(zip(self._rows, self._places, strict=True)))
        (most,) = status.worst(len(self._rows))
        for _ in range(0, most, TEXTS_PER_GATHER):
            block = [(row, *self._read(place)) for (row, place), _ in zip(own, range(TEXTS_PER_GATHER), strict=False)]
            for of_rank in gather_object([(accelerator.process_index, block)]):
                if accelerator.is_main_process and of_rank[0] != accelerator.process_index:
                    for texts in of_rank[1]:
                        self.add(*texts)

    def sorted(self) -> Iterator[tuple[int, str, str]]:
        """(row, reference, hypothesis) by row."""
        yield from self.in_order(np.sort(np.asarray(self._rows)))

    def in_order(self, rows: np.ndarray) -> Iterator[tuple[int, ...]]:
        """(row, its texts) in the order of `rows`, all of which were added."""
        held = np.asarray(self._rows)
        by_row = np.argsort(held, kind="stable")
        for index in by_row[np.searchsorted(held[by_row], rows)].tolist():
            yield self._rows[index], *self._read(self._places[index])

    def _read(self, place: int) -> tuple[str, ...]:
        self._file.seek(place)
        return tuple(json.loads(self._file.readline()))


def write_utterances(path: Path, dataset: ShardDataset, evaluation: Evaluation, texts: TextSpool) -> None:
    """A row per scored utterance in the order of the corpus: texts, errors, and the corpus' own columns."""
    wanted = np.zeros(len(dataset), bool)
    wanted[evaluation.rows] = True
    extra = [name for name in dataset.column_names if name == "snr_db" or name not in OWN_COLUMNS | {"speaker"}]
    names, own = ("id", "speaker", *extra), (*TEXT_COLUMNS, *COUNT_COLUMNS)
    seconds = dataset.num_samples / SAMPLE_RATE_HZ

    columns = zip(*(dataset.column(name) for name in names), strict=True)
    of_rows = itertools.compress(columns, wanted)
    rows = (
        (utterance_id, reference, hypothesis, f"{seconds[row]:.3f}", speaker, *counts, *others)
        for (utterance_id, speaker, *others), counts, (row, reference, hypothesis) in zip(
            of_rows, evaluation.counts.tolist(), texts.sorted(), strict=True
        )
    )
    write_table(path, (*own, *(corpus_name(name, own) for name in extra)), rows)


@dataclass(frozen=True)
class Utterances:
    """The errors of an evaluation as read back from utterances.csv.

    Attributes:
        index: place of each id.
        references: hash of each reference, in one case, [N].
        speakers: code of each speaker, -1 where unknown, [N].
        counts: COUNT_COLUMNS, int64 [N, 8].
    """

    index: dict[str, int]
    references: np.ndarray
    speakers: np.ndarray
    counts: np.ndarray


def read_utterances(folder: Path) -> Utterances:
    """The rows of `folder/utterances.csv`; their texts are not kept.

    Raises:
        UsageError: the file is not one that evaluate.py wrote.
    """
    path = folder / UTTERANCES_FILE
    index: dict[str, int] = {}
    speakers: dict[str, int] = {"": -1}
    references, codes, counts = [], [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                index[row["id"]] = len(index)
                references.append(hash(row["reference"].casefold()))  # A model of the other case reads the same.
                codes.append(speakers.setdefault(row["speaker"], len(speakers) - 1))
                counts.append([int(row[name]) for name in COUNT_COLUMNS])
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} is not a table that evaluate.py wrote ({error!r}): run evaluate.py again") from error
    if len(index) != len(counts) or not counts:
        raise UsageError(f"{path} holds {len(counts)} rows and {len(index)} ids: run evaluate.py again")
    return Utterances(index, np.array(references), np.array(codes, np.int32), np.array(counts, np.int64))


def write_results(folder: Path, results: dict[str, object]) -> None:
    """`results.json`; written last, it says that the folder is complete."""
    write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False))


def write_drops(path: Path, split: str, dropped: list[tuple[str, str]]) -> None:
    """`split,id,reason,detail` of each utterance that --unknown drop_utterance has left out; no file without any."""
    path.unlink(missing_ok=True)
    if dropped:
        write_table(path, DROP_COLUMNS, ((split, name, "unknown_letters", letters) for name, letters in dropped))


def print_results(results: dict[str, object]) -> None:
    """One screen on stdout: the figures, what they cover, the slices, the letters."""
    say("\n".join(_summary(results)), sys.stdout)
    if results["slices"]:
        print_table(_slice_table(results["slices"]))
        say(_worst(results), sys.stdout)
    say("\n".join(letter_lines(results["letters"], results["rare_in_training"], RESULTS_FILE)), sys.stdout)


def _summary(results: dict[str, object]) -> list[str]:
    words, unit, processes = results["words"], results["interval"], results["processes"]
    precision = {"no": "fp32"}.get(processes["mixed_precision"], processes["mixed_precision"])
    total = max(words["hits"] + words["deletions"] + words["substitutions"], 1)
    share = f" of {results['utterances_of_split']:,}" if results["utterances"] < results["utterances_of_split"] else ""
    covers = "" if unit["unit"] == "speakers" else "; fewer than 10 speakers are known, so it does not cover new voices"
    lines = [
        f"{results['model']} on {results['data']}: {results['utterances']:,}{share} utterances, "
        f"{results['seconds'] / 3600:.2f} h, scored in {results['seconds_taken']:.0f} s on {processes['device']} in "
        f"{precision}",
        f"  WER {_with_limits(results, 'wer')}   CER {_with_limits(results, 'cer')}   "
        f"sentences with an error {_with_limits(results, 'sentence_error_rate')}",
        f"  words: {words['substitutions'] / total:.2%} replaced, {words['deletions'] / total:.2%} lost, "
        f"{words['insertions'] / total:.2%} inserted, of {total:,}",
        f"  95 % intervals by bootstrap over {unit['units']:,} {unit['unit']}{covers}",
        f"  near-ties: {results['near_ties']:,} of {results['frames']:,} frames, where another machine may decide "
        "otherwise",
    ]
    if precision != "fp32":
        lines.append(f"  in {precision} a text may depend on the batch it is scored in; in fp32 it does not")
    if results["known_of_training"] == "data":
        lines.append("  *_in_train: of all the data's training split; what this model was trained on is not known")
    unknown = results["unknown_characters"]
    if unknown:
        named = ", ".join(f"{letter!r} {count}" for letter, count in list(unknown.items())[:LETTERS_SHOWN])
        done = {
            "count": "they count as errors; --unknown drop_character or drop_utterance leaves them out",
            "drop_character": "taken out of the references",
            "drop_utterance": f"their utterances are not scored; {DROPS_FILE} names them",
        }[results["unknown"]]
        lines.append(f"  letters of this split that the vocabulary lacks: {sum(unknown.values()):,} ({named}): {done}")
    return lines


def _with_limits(results: dict[str, object], name: str) -> str:
    return f"{results[name]:.2%}{describe_limits(results, name)}"


def _slice_table(slices: list[dict[str, object]]) -> Table:
    table = Table("slice", "group", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("utterances", "WER", "95 %", "CER"):
        table.add_column(name, justify="right")
    previous = None
    for one in slices:
        limits = "" if one["wer_low"] is None else f"{one['wer_low']:.2%} to {one['wer_high']:.2%}"
        count = f"{one['utterances']:,}" + (" (few)" if one["is_small"] else "")
        values = (one["group"], count, f"{one['wer']:.2%}", limits, f"{one['cer']:.2%}")
        table.add_row("" if one["slice"] == previous else one["slice"], *map(Text, values))
        previous = one["slice"]
    return table


def _worst(results: dict[str, object]) -> str:
    worst = results["worst_slice"]
    if worst is None:
        return "no slice is large enough to be called the worst"
    named = f"worst slice: {worst['slice']} {worst['group']}, WER {_with_limits(worst, 'wer')}"
    if not worst["is_beyond_chance"]:
        return f"{named}; that it is the worst may be chance"
    voices = "" if worst["unit"] == "speakers" else " for these voices"
    return f"{named}, above the whole beyond chance{voices}"
