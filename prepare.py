"""Raw corpus to shards that training reads memory-mapped.

    python prepare.py --corpus cv-corpus-21.0/en --data_dir data/en
    python prepare.py --corpus manifest.csv --data_dir data/x --split_by speaker --split_fractions 0.8 0.1 0.1
    python prepare.py --corpus digits --data_dir data/digits --test_speakers theo
    python prepare.py --corpus recordings --data_dir data/untranscribed --untranscribed      (audio alone, any folders)
    python prepare.py --data_dir data/en --verify
    accelerate launch --multi_gpu --num_machines 2 ... prepare.py ...      (each part is made once, by one process)

Writes DATA_DIR/{train,dev,test}/part_1, part_2, ... (audio once, as 16 kHz int16; text as found) and dropped.csv with a
reason for every row left out. Started again, it goes on where it was stopped.
"""

from errors import RunFailed, UsageError, exit_status

# isort: split

import launched  # noqa: F401 - before torch

# isort: split

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import itertools
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import pyarrow.compute

from atomic import DISK_FULL, disk_full, format_bytes, free_bytes, sync_open_file, write_atomically, write_table
from audio import RESAMPLING, SAMPLE_RATE_HZ, Clip, ClipError, ClipPool, ClipRequest, usable_cores
from config import PrepareConfig, parse_arguments
from corpora import DROP_COLUMNS, DROP_REASONS, SPLITS, AudioLocator, Corpus, SourceRow, open_corpus
from demo import make_demo_corpus
from hosts import check_same
from integrity import (
    SCHEMA_VERSION,
    UNTRANSCRIBED,
    Damage,
    checked_numbers,
    find_damage,
    hash_file,
    numbers_of,
    open_index,
    part_folders,
    read_batch,
    read_sealed,
    refusing_other_schema,
    sealed,
    verify,
    write_sealed,
)
from lock import only_process_in
from pieces import without_text
from progress import Progress
from shards import PartWriter, new_part, remove_unfinished_parts
from splits import SplitPlan, plan_splits, stable_hash
from team import ALONE, Team, team_of_launcher

PROBED_CLIPS = 200
# The longest piece of a recording without text: pre-training on 10 to 20 s is usual, and attention's memory grows with
# the square.
SEGMENT_SECONDS = 20.0
MAX_METADATA_COLUMNS = 200
# Of the estimated size: clips differ, and a full disk costs more than this much room.
DISK_MARGIN = 1.1
BYTES_PER_SAMPLE = 2
# Redrawing a bar takes as long as reading a few rows.
ROWS_PER_ADVANCE = 1_000
DURATION_EDGES_SECONDS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30)
OWN_FILES = {*SPLITS, "prepare.json", "dropped.csv", "demo_corpus"}
PACKAGES = ("torch", "torchaudio", "soundfile", "pyarrow", "numpy")


def main() -> None:
    """The command."""
    config = parse_arguments(PrepareConfig, sys.argv[1:], __doc__)
    with team_of_launcher(config) as team:
        if config.corpus:
            prepare(config, team=team)
        elif team.is_first:
            verify(Path(config.data_dir))
        team.wait()


def prepare(config: PrepareConfig, is_waiting: bool = False, team: Team = ALONE) -> None:
    """Read, split, decode and write a corpus; finished parts are kept and checked, damaged ones are made again.

    Args:
        config: the settings.
        is_waiting: wait for another prepare.py in the same folder instead of being refused.
        team: the processes that divide the parts; the first one alone checks, speaks and writes the rest.

    Raises:
        UsageError: the corpus or the settings are refused, or another process is at it; nothing was written.
        RunFailed: stopped on the way; finished parts stay, and the same command goes on.
    """
    out = Path(config.data_dir)
    with contextlib.ExitStack() as stack:
        team.decide_first(lambda: _occupy(out, is_waiting, stack))
        pool = stack.enter_context(ClipPool(_num_workers(config.num_workers, team.on_this_host)))
        corpus, locator = _open(config, out, pool, team)
        state = corpus.state()
        with _showing_passes(corpus, team.is_first) as shown:
            plan = plan_splits(shown, config)
            scan = _scan(shown, plan)
        if team.status is not None:
            check_same(team.status, scan.facts(), "give every host the same --corpus")
        job = _Job(
            corpus,
            state,
            scan,
            locator,
            config.chunk_size,
            _settings(config, scan),
            _damage_by_reading if config.verify else _damage_at_a_glance,
        )
        if team.is_first:
            print(f"{config.corpus}: {corpus.kind}, {scan.describe()}", flush=True)
            for note in (*corpus.notes, *plan.notes, *scan.notes(config.untranscribed)):
                print(f"note: {note}", flush=True)
        missing = team.decide_first(lambda: job.find_missing(out, pool))
        with _saying_what_stays(out):
            if missing:
                job.write_parts(out, pool, dict(team.share([*missing.items()])), team.is_first)
            team.wait()
            if team.is_first:
                _finish(out, config, job.settings)
    if team.is_first:
        print(_summary(out), flush=True)


def _occupy(out: Path, is_waiting: bool, stack: contextlib.ExitStack) -> None:
    """Hold the output folder until the stack ends."""
    _refuse_foreign_folder(out)
    stack.enter_context(only_process_in(out, is_waiting))


def _finish(out: Path, config: PrepareConfig, settings: dict) -> None:
    """dropped.csv, and prepare.json, the mark of a finished set."""
    _write_dropped(out)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "flags": _flags(config),
        "versions": _versions(),
        "dropped_sha256": hash_file(out / "dropped.csv"),
        "splits": _split_facts(out),
    }
    write_atomically(out / "prepare.json", sealed(facts))


# What decoding gave; None for a row that was turned down before.
_Outcome: TypeAlias = Clip | ClipError | None


@dataclass
class _Scan:
    """What a first pass over the rows found: a few bytes per row while it lasts, one that is kept.

    split_codes: of every row, its split as a position in SPLITS; finding it again takes as long as reading the row.
    """

    rows: dict[str, int]
    split_codes: array
    metadata_columns: list[str]
    repeated_ids: set[int]

    def facts(self) -> dict[str, str]:
        """What must be the same wherever the corpus is read."""
        return {"the corpus": f"{self.describe()}, {hashlib.sha256(self.split_codes.tobytes()).hexdigest()[:8]}"}

    def describe(self) -> str:
        return ", ".join(f"{split} {count:,} rows" for split, count in self.rows.items())

    def notes(self, is_untranscribed: bool) -> list[str]:
        meaning = {"dev": "training cannot be evaluated on it", "test": "there is nothing to test on at the end"}
        if is_untranscribed:
            del meaning["test"]
        return [f"the {split} split is empty: {meaning[split]}" for split in meaning if not self.rows[split]]


@dataclass
class _Job:
    """One corpus on its way to one output folder.

    Attributes:
        state: of the corpus when it was scanned.
        find_damage: what is wrong with a finished part.
    """

    corpus: Corpus
    state: int
    scan: _Scan
    locator: AudioLocator
    chunk_size: int
    settings: dict
    find_damage: Callable[[Path], list[str]]

    def find_missing(self, out: Path, pool: ClipPool) -> dict[Path, int]:
        """The parts that are still to be made (as train/part_1), with their rows, once it is known that they can be.

        Raises:
            UsageError: finished parts are another corpus', most clips cannot be used, or the disk is too small.
        """
        missing = self.check_existing(out)
        if missing:
            self.probe(out, pool, sum(missing.values()))
        else:
            print("every part is there already", flush=True)
        with _saying_what_stays(out):
            remove_unfinished_parts(out)
        return {folder.relative_to(out): rows for folder, rows in missing.items()}

    def check_existing(self, out: Path) -> dict[Path, int]:
        """Compare finished parts with the settings and the corpus; those that are still to be made, with their rows.

        A damaged part is named and counts as missing.

        Raises:
            UsageError: another corpus, other settings or another version of this program made them.
        """
        missing: dict[Path, int] = {}
        if (out / "prepare.json").exists():
            self._check_facts(out, out / "prepare.json")
        rows_to_read = {split: self._rows_to_last_part(out, split) for split in SPLITS}
        if not any(rows_to_read.values()):
            return {folder: rows for split in SPLITS for folder, rows in self._part_sizes(out, split)}
        with Progress("checking finished parts", sum(rows_to_read.values()), "rows") as progress:
            for split in SPLITS:
                rows_left = rows_to_read[split]
                for folder, rows, items, fingerprint in self._parts(out, split):
                    if folder.exists():
                        if not self._is_intact(out, folder, _counted(items, progress), fingerprint):
                            missing[folder] = rows
                    else:
                        missing[folder] = rows
                        if rows_left > 0:  # behind these rows lies a finished part
                            _use_up(_counted(items, progress))
                    rows_left -= rows
        return missing

    def _is_intact(self, out: Path, folder: Path, items: Iterator, fingerprint: "hashlib._Hash") -> bool:
        facts = self._check_facts(out, folder / "part.json")
        _use_up(items)
        if facts and facts["source_fingerprint"] != fingerprint.hexdigest():
            raise UsageError(
                f"{folder} was made from other rows or files than the corpus holds now: "
                f"use another --data_dir, or delete {out} to prepare it again"
            )
        damage = self.find_damage(folder)
        for what in damage:
            print(f"damaged, will be made again: {folder}: {what}", flush=True)
        return not damage

    def _check_facts(self, out: Path, path: Path) -> dict:
        """The facts of prepare.json or part.json, which must agree with the settings; none where it is damaged."""
        try:
            with refusing_other_schema(out):
                facts = read_sealed(path)
        except Damage:
            return {}
        _check_settings(out, facts["settings"], self.settings)
        return facts

    def probe(self, out: Path, pool: ClipPool, missing_rows: int) -> None:
        """Decode the first clips and throw them away: do they decode, and will they fit on the disk?

        Raises:
            UsageError: most of them cannot be used, or the disk is too small.
        """
        items = (item for split in SPLITS for _, _, items, _ in self._parts(out, split) for item in items)
        usable = (item for item in items if not _is_held_out(item[0].error))
        reasons: Counter[str] = Counter()
        num_samples, example = [], ""
        for judged, result in pool.read(itertools.islice(usable, PROBED_CLIPS)):
            error = judged.error or (result if isinstance(result, ClipError) else None)
            if error is None:
                num_samples.append(len(result.samples))
            elif not reasons[error.reason]:
                example = example or f"{judged.row.id}: {error.detail}"
            if error is not None:
                reasons[error.reason] += 1
        bad, total = reasons.total(), reasons.total() + len(num_samples)
        if bad > total / 2:
            reason = reasons.most_common(1)[0][0]
            meaning, remedy = DROP_REASONS[reason]
            raise UsageError(
                f"{bad} of the first {total} clips cannot be used, mostly {reason} ({meaning}; {example}): {remedy}"
            )
        seconds_per_row = sum(num_samples) / SAMPLE_RATE_HZ / max(len(num_samples), 1)
        _check_disk(out, _bytes_of_audio(missing_rows * seconds_per_row))

    def write_parts(self, out: Path, pool: ClipPool, wanted: Mapping[Path, int], is_shown: bool) -> None:
        """Write the `wanted` parts, also in the place of a damaged one.

        Args:
            out: the output folder.
            pool: decodes.
            wanted: what `find_missing` names, or a share of it.
            is_shown: the progress, on the screen.
        """
        with Progress("preparing", sum(wanted.values()), "clips", is_shown) as progress:
            for split in SPLITS:
                for folder, rows, items, fingerprint in self._parts(out, split):
                    if folder.relative_to(out) in wanted:
                        self._write_part(folder, pool.read(items), fingerprint, progress)
                    else:
                        with Progress(f"passing over {split}/{folder.name}", rows, "rows", is_shown) as passing:
                            _use_up(_counted(items, passing))  # keeps track of the ids

    def _write_part(
        self,
        folder: Path,
        results: Iterator[tuple["_Judged", _Outcome]],
        fingerprint: "hashlib._Hash",
        progress: Progress,
    ) -> None:
        seconds_before = progress.audio_seconds
        try:
            with new_part(folder) as unfinished:
                with (unfinished / "data.arrow").open("wb") as file:
                    facts = self._write_rows(file, results, progress)
                    sync_open_file(file)
                facts |= {
                    "schema_version": SCHEMA_VERSION,
                    "source_fingerprint": fingerprint.hexdigest(),
                    "settings_fingerprint": _fingerprint(self.settings),
                    "settings": self.settings,
                }
                write_sealed(unfinished / "part.json", facts)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            # This part's audio so far, and for each row that is left as much as the rows of this run had.
            seconds = progress.audio_seconds - seconds_before
            seconds += progress.audio_seconds / max(progress.done, 1) * (progress.total - progress.done)
            remedy = "finished parts are kept, make room and run the same command again to go on"
            raise RunFailed(disk_full(folder, _bytes_of_audio(seconds), free_bytes(folder), remedy)) from error

    def _write_rows(
        self, file: io.BufferedWriter, results: Iterator[tuple["_Judged", _Outcome]], progress: Progress
    ) -> dict:
        writer, dropped, source_rows = PartWriter(file, self.scan.metadata_columns), [], 0
        for judged, result in results:
            source_rows += 1
            error = judged.error or (result if isinstance(result, ClipError) else None)
            progress.advance(1, 0.0 if error else len(result.samples) / SAMPLE_RATE_HZ)
            if error is None:
                writer.add(judged.row, result)
            else:
                dropped.append({"id": judged.row.id, "reason": error.reason, "detail": error.detail})
        return writer.finish() | {"source_rows": source_rows, "dropped": dropped}

    def _parts(self, out: Path, split: str) -> Iterator[tuple[Path, int, Iterator, "hashlib._Hash"]]:
        """Folder, rows, judged rows (to be used up before the next part) and their growing fingerprint."""
        if self.corpus.state() != self.state:
            raise RunFailed(
                f"the files of {self.corpus.folder} changed while they were read: run the same command again"
            )
        wanted = SPLITS.index(split)
        coded = zip(self.scan.split_codes, self.corpus.read(), strict=False)
        rows = (row for code, row in coded if code == wanted)
        seen: set[int] = set()
        for folder, count in self._part_sizes(out, split):
            fingerprint = hashlib.blake2b(digest_size=16)
            chunk = itertools.islice(rows, self.chunk_size)
            yield folder, count, self._judge(chunk, split, seen, fingerprint), fingerprint

    def _part_sizes(self, out: Path, split: str) -> Iterator[tuple[Path, int]]:
        """Folder and rows of every part."""
        for number, start in enumerate(range(0, self.scan.rows[split], self.chunk_size), 1):
            yield out / split / f"part_{number}", min(self.chunk_size, self.scan.rows[split] - start)

    def _judge(
        self, rows: Iterable[SourceRow], split: str, seen: set[int], fingerprint: "hashlib._Hash"
    ) -> Iterator[tuple["_Judged", ClipRequest | None]]:
        """Rows with their request for a clip, or with the reason that there is none."""
        for row in rows:
            request, mtime_ns, error = None, 0, None
            try:
                request, mtime_ns = self.locator.locate(row)
            except ClipError as missing:
                error = missing
            _add_row(fingerprint, row, request.source_bytes if request else -1, mtime_ns)
            if row.problem is not None:
                error = ClipError(*row.problem)
            elif not self.settings.get(UNTRANSCRIBED) and (row.text is None or (split == "train" and not row.text)):
                error = ClipError("no_text", "no transcript")
            elif error is None and self._is_repeated(row.id, seen):
                error = ClipError("duplicate_id", "an earlier row of this split has the same id")
            yield _Judged(row, error), None if error else request

    def _is_repeated(self, row_id: str, seen: set[int]) -> bool:
        value = stable_hash(row_id)
        if value not in self.scan.repeated_ids:
            return False
        repeated = value in seen
        seen.add(value)
        return repeated

    def _rows_to_last_part(self, out: Path, split: str) -> int:
        """Rows of a split up to the end of its last finished part; parts that this corpus does not make are refused."""
        expected = -(-self.scan.rows[split] // self.chunk_size)
        numbers = {f"part_{number}": number for number in range(1, expected + 1)}
        found = [path.name for path in (out / split).glob("part_*")]
        if not numbers.keys() >= set(found):
            raise UsageError(
                f"{out / split} holds {len(found)} parts, this corpus and --chunk_size {self.chunk_size} make "
                f"{expected}: use another --data_dir, or delete {out} to prepare it again"
            )
        last = max((numbers[name] for name in found), default=0)
        return min(last * self.chunk_size, self.scan.rows[split])


@dataclass(frozen=True, slots=True)
class _Judged:
    row: SourceRow
    error: ClipError | None


# ---------------------------------------------------------------------------------------------------------------------
# Before the first clip


def _open(config: PrepareConfig, out: Path, pool: ClipPool, team: Team) -> tuple[Corpus, AudioLocator]:
    corpus = _recognise(config, out, pool, team)
    locator = AudioLocator(corpus.folder, config.audio_root)
    return (without_text(corpus, locator, _segment_seconds(config)) if config.untranscribed else corpus), locator


def _segment_seconds(config: PrepareConfig) -> float:
    return SEGMENT_SECONDS if config.segment_seconds is None else config.segment_seconds


def _recognise(config: PrepareConfig, out: Path, pool: ClipPool, team: Team) -> Corpus:
    if config.corpus != "demo":
        columns = config.audio_column_name, config.text_column_name
        return open_corpus(Path(config.corpus), config.train_split, *columns, needs_text=not config.untranscribed)
    if not (out / "prepare.json").exists():
        pool.warm_up()  # beside the synthesis
    team.decide_first(lambda: make_demo_corpus(out / "demo_corpus"))
    return replace(open_corpus(out / "demo_corpus"), kind="demo")


@contextlib.contextmanager
def _showing_passes(corpus: Corpus, is_shown: bool) -> Iterator[Corpus]:
    """The same corpus, with a bar for every pass over its rows; the block's end takes down one that was broken off."""
    rows, passes = max(corpus.count_lines(), 1), 0
    with contextlib.ExitStack() as bar:

        def read() -> Iterator[SourceRow]:
            nonlocal rows, passes
            bar.close()
            passes += 1
            progress = bar.enter_context(Progress(f"reading rows, pass {passes}", rows, "rows", is_shown))
            yield from _counted(corpus.read(), progress)
            rows = max(progress.done, 1)

        yield replace(corpus, read=read)


_Item = TypeVar("_Item")


def _counted(items: Iterable[_Item], progress: Progress) -> Iterator[_Item]:
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if number % ROWS_PER_ADVANCE == 0:
            progress.advance(ROWS_PER_ADVANCE)
    progress.advance(number % ROWS_PER_ADVANCE)


def _use_up(items: Iterator) -> None:
    for _ in items:
        pass


def _scan(corpus: Corpus, plan: SplitPlan) -> _Scan:
    rows = dict.fromkeys(SPLITS, 0)
    columns: dict[str, None] = {}
    ids, codes = array("Q"), array("B")
    for row in corpus.read():
        split = plan.split_of(row)
        rows[split] += 1
        codes.append(SPLITS.index(split))
        columns.update(dict.fromkeys(row.metadata))
        ids.append(stable_hash(row.id))
    if len(columns) > MAX_METADATA_COLUMNS:
        raise UsageError(f"the corpus has {len(columns)} columns, at most {MAX_METADATA_COLUMNS} are kept: remove some")
    if not rows["train"]:
        raise UsageError(
            f"{corpus.folder}: the train split is empty (dev {rows['dev']}, test {rows['test']} rows): "
            "name the corpus that holds training rows, or give --split_by"
        )
    values, counts = np.unique(np.asarray(ids, np.uint64), return_counts=True)
    return _Scan(rows, codes, list(columns), set(values[counts > 1].tolist()))


def _settings(config: PrepareConfig, scan: _Scan) -> dict:
    """All that decides what the parts hold; the corpus itself is in their fingerprints."""
    chosen = ("chunk_size", "train_split", "audio_column_name", "text_column_name", "audio_root")
    settings = {name: getattr(config, name) for name in chosen}
    if config.split_by or config.test_speakers:
        settings |= {name: getattr(config, name) for name in ("split_by", "split_fractions", "test_speakers", "seed")}
    if config.untranscribed:
        # Absent from other sets, so that those of earlier versions are still recognised.
        settings |= {UNTRANSCRIBED: True, "segment_seconds": _segment_seconds(config), "seed": config.seed}
        settings["dev_fraction"] = config.dev_fraction
    return settings | {
        "schema_version": SCHEMA_VERSION,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "resampling": RESAMPLING,
        "metadata_columns": scan.metadata_columns,
    }


def _flags(config: PrepareConfig) -> list[str]:
    """The command line that gives these settings, but for what does not change the parts, and the output folder."""
    flags = []
    for default in dataclasses.fields(PrepareConfig):
        value = getattr(config, default.name)
        if default.name in ("data_dir", "num_workers", "verify") or value == getattr(PrepareConfig(), default.name):
            continue
        flags += [f"--{default.name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _check_settings(out: Path, found: dict, wanted: dict) -> None:
    differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if differing:
        changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted.get(name)!r})" for name in differing)
        raise UsageError(
            f"{out} was prepared with other settings: {changes}: give the same ones, use another --data_dir, "
            f"or delete {out} to prepare it again"
        )


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--data_dir {out} is a file: name a folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and not names & OWN_FILES and not all(name.startswith(".") for name in names):
        raise UsageError(f"--data_dir {out} holds other files ({min(names)}, ...): name a new or empty folder")


def _bytes_of_audio(seconds: float) -> int:
    """Room for prepared audio, with a margin."""
    return int(DISK_MARGIN * BYTES_PER_SAMPLE * SAMPLE_RATE_HZ * seconds)


def _check_disk(out: Path, bytes_needed: int) -> None:
    free = free_bytes(out)
    if bytes_needed > free:
        raise UsageError(
            f"--data_dir {out} needs about {format_bytes(bytes_needed)} (estimated from the first clips), "
            f"{format_bytes(free)} are free: free some, or name a folder on another disk"
        )


def _is_held_out(error: ClipError | None) -> bool:
    return error is not None and error.reason.startswith("held_out")


def _num_workers(num_workers: int, processes: int) -> int:
    return num_workers if num_workers > 0 else max(1, usable_cores() // processes)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def _saying_what_stays(out: Path) -> Iterator[None]:
    """What stops the writing becomes one line."""
    try:
        yield
    except (OSError, Damage) as error:
        path, reason = getattr(error, "filename", None) or out, getattr(error, "strerror", None) or error
        raise RunFailed(f"{path}: {reason}; finished parts are kept, run the same command again to go on") from error


def _damage_at_a_glance(folder: Path) -> list[str]:
    """What is wrong with a part, without reading its audio."""
    try:
        checked_numbers(folder)
    except Damage as damage:
        return [str(damage)]
    return []


def _damage_by_reading(folder: Path) -> list[str]:
    """What is wrong with a part, every byte read."""
    return [what for _, what in find_damage([folder])]


def _add_row(fingerprint: "hashlib._Hash", row: SourceRow, source_bytes: int, mtime_ns: int) -> None:
    fields = (row.id, row.audio_path, row.text, row.speaker, row.metadata, row.offset_seconds, row.duration_seconds)
    fingerprint.update(json.dumps((*fields, row.problem, source_bytes, mtime_ns)).encode())


def _fingerprint(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write_dropped(out: Path) -> None:
    rows = (
        (split, entry["id"], entry["reason"], entry["detail"])
        for split in SPLITS
        for folder in part_folders(out, split)
        for entry in read_sealed(folder / "part.json")["dropped"]
    )
    # The reasons stand in part.json too, in more words.
    num_bytes = sum((folder / "part.json").stat().st_size for split in SPLITS for folder in part_folders(out, split))
    write_table(out / "dropped.csv", DROP_COLUMNS, rows, num_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# The summary


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _split_facts(out: Path) -> dict[str, dict]:
    facts = {}
    for split in SPLITS:
        parts = [read_sealed(folder / "part.json") for folder in part_folders(out, split)]
        reasons = Counter(entry["reason"] for part in parts for entry in part["dropped"])
        facts[split] = {
            "parts": len(parts),
            "rows": sum(part["rows"] for part in parts),
            "seconds": sum(part["seconds"] for part in parts),
            "dropped": dict(reasons.most_common()),
        }
    return facts


def _summary(out: Path) -> str:
    facts = read_sealed(out / "prepare.json")["splits"]
    lines = ["", f"{'split':<7}{'hours':>9}{'clips':>11}{'speakers':>10}{'dropped':>9}{'parts':>7}"]
    histograms = {}
    for split in SPLITS:
        histograms[split], speakers = _durations_and_speakers(out, split)
        found = facts[split]
        lines.append(
            f"{split:<7}{found['seconds'] / 3600:>9.2f}{found['rows']:>11,}{speakers or '-':>10}"
            f"{sum(found['dropped'].values()):>9,}{found['parts']:>7}"
        )
    lines += ["", *_histogram_lines(sum(histograms.values()))]
    reasons: Counter[str] = Counter()
    for found in facts.values():
        reasons.update(found["dropped"])
    lines += ["", f"{reasons.total():,} rows left out" + (f", each in {out / 'dropped.csv'}:" if reasons else "")]
    lines += [f"  {count:>9,}  {reason} ({DROP_REASONS[reason][0]})" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def _durations_and_speakers(out: Path, split: str) -> tuple[np.ndarray, int]:
    edges = np.array([*DURATION_EDGES_SECONDS, np.inf]) * SAMPLE_RATE_HZ
    histogram = np.zeros(len(DURATION_EDGES_SECONDS), np.int64)
    speakers: set[str] = set()
    for folder in part_folders(out, split):
        with open_index(folder / "data.arrow", ("num_samples", "speaker")) as reader:
            for position in range(reader.num_record_batches):
                batch = read_batch(reader, position)
                histogram += np.histogram(numbers_of(batch.column("num_samples")), edges)[0]
                speakers.update(pyarrow.compute.unique(batch.column("speaker")).to_pylist())
    return histogram, len(speakers - {""})


def _histogram_lines(histogram: np.ndarray) -> list[str]:
    names = [f"{low}-{high} s" for low, high in itertools.pairwise(DURATION_EDGES_SECONDS)]
    names.append(f"over {DURATION_EDGES_SECONDS[-1]} s")
    longest = max(int(histogram.max()), 1)
    rows = [index for index, count in enumerate(histogram) if count]
    return [
        f"{names[index]:>10}  {histogram[index]:>9,}  {'#' * max(1, round(40 * int(histogram[index]) / longest))}"
        for index in (range(rows[0], rows[-1] + 1) if rows else ())
    ]


if __name__ == "__main__":
    sys.exit(exit_status(main))
