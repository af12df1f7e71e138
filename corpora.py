"""Readers: a corpus in one of the usual layouts as a stream of rows.

A reader is a generator that can be started again and keeps nothing per row. It decides nothing about audio: a row says
where its clip should lie, `AudioLocator` says whether it may and does.
"""

# os.path instead of pathlib: it runs for every row of corpora with millions of them.
# ruff: noqa: PTH100, PTH112, PTH114, PTH116, PTH118, PTH120, PTH122

import contextlib
import csv
import functools
import itertools
import json
import math
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from audio import ClipError, ClipRequest, Measures
from errors import UsageError
from recording import AUDIO_SUFFIXES

SPLITS = ("train", "dev", "test")
# Of dropped.csv and drop_list.csv.
DROP_COLUMNS = ("split", "id", "reason", "detail")
# Every reason of dropped.csv: what it means, and the remedy when it is the reason of most rows.
DROP_REASONS = {
    "missing": ("no such file", "check the folder of the clips, or name it with --audio_root"),
    "outside_corpus": ("the path leads out of the corpus folder", "name the folder it may lead into with --audio_root"),
    "undecodable": ("libsndfile cannot read it", "WAV, FLAC, Ogg and MP3 are read; convert others with ffmpeg"),
    "empty": ("no samples", "the audio files hold no sound: unpack or copy the corpus again"),
    "not_finite": ("NaN or infinite samples", "convert the clips to 16-bit WAV or FLAC again"),
    "bad_segment": ("offset and duration lie outside the file", "offset and duration must be in seconds"),
    "too_long": ("longer than 30 minutes", "cut the recordings, or give offset and duration of each utterance"),
    "no_text": ("the transcript is missing or blank", "name the column that holds it with --text_column_name"),
    "duplicate_id": ("an earlier row of the split has this id", "give every row an id of its own"),
    "bad_row": ("the row itself is malformed", "the rows do not fit the header: check separator and quoting"),
    "held_out_sentence": ("validated.tsv: its sentence is in dev or test", "use --train_split train"),
    "held_out_speaker": ("validated.tsv: its speaker is in dev or test", "use --train_split train"),
}
AUDIO_COLUMNS = ("path", "filename", "file_name", "audio_filepath", "audio_path", "file", "audio", "wav")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
ID_COLUMNS = ("id", "utterance_id", "utt_id")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "valid", "validation", "val"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Columns of the prepared data that a metadata column must not collide with.
OWN_COLUMNS = (
    *("id", "audio", "num_samples", "text", "speaker"),
    *(field.name for field in fields(Measures)),
    *("source_rate_hz", "audio_sha256"),
)
MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz", ".zip")
MAX_CSV_FIELD_CHARACTERS = 10_000_000
ROWS_TO_FIND_CLIPS = 20
BYTES_PER_READ = 1_000_000
# What --train_split validated leaves out; a row's verdict is the position here.
HELD_OUT_PROBLEMS = (
    None,
    ("held_out_sentence", "its sentence is in dev or test"),
    ("held_out_speaker", "its speaker is in dev or test"),
)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a corpus.

    id: unique in its split, or the later row is dropped.
    split: train, dev, test, or None when the corpus does not say.
    audio_path: as the corpus gives it, relative to the corpus folder (or --audio_root) or absolute.
    text: None when there is no transcript; ends stripped.
    problem: reason and detail when the row cannot be used, whatever its audio.
    start_reach_seconds, end_reach_seconds: as in `ClipRequest`.
    """

    id: str
    split: str | None
    audio_path: str
    text: str | None
    speaker: str
    metadata: dict[str, str]
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    problem: tuple[str, str] | None = None
    start_reach_seconds: float = 0.0
    end_reach_seconds: float = 0.0


@dataclass(frozen=True)
class Corpus:
    """A corpus that was recognised: `read()` starts a new pass over its rows, `files()` names those that hold them.

    num_rows: where it is known and lines of files do not tell it.
    """

    kind: str
    folder: Path
    read: Callable[[], Iterator[SourceRow]]
    notes: tuple[str, ...] = ()
    files: Callable[[], Iterable[Path]] = tuple
    num_rows: int | None = None

    def count_lines(self) -> int:
        """Lines of the files: the number of rows or a little more, in a hundredth of the time of a pass."""
        if self.num_rows is not None:
            return self.num_rows
        lines = 0
        for path in self.files():
            # What cannot be read is said by `read()`.
            with contextlib.suppress(OSError), path.open("rb") as file:
                while block := file.read(BYTES_PER_READ):
                    lines += block.count(b"\n")
                    unended = not block.endswith(b"\n")
                lines += file.tell() > 0 and unended
        return lines

    def state(self) -> int:
        """A hash that changes with the files; row n is the same in two passes that see the same one."""
        facts = []
        for path in self.files():
            with contextlib.suppress(OSError):
                found = path.stat()
                facts.append((str(path), found.st_size, found.st_mtime_ns))
        return hash(tuple(facts))


@dataclass(frozen=True)
class ColumnNames:
    """What the user says about columns (None: the usual names), and whether there must be a text."""

    audio: str | None = None
    text: str | None = None
    needs_text: bool = True


def open_corpus(
    path: Path,
    train_split: str = "train",
    audio_column_name: str | None = None,
    text_column_name: str | None = None,
    needs_text: bool = True,
) -> Corpus:
    """Recognise the corpus at `path`; a header is read, no row.

    Without `needs_text` a table may lack the column of transcripts, and a folder of audio files is a corpus too.

    Raises:
        UsageError: nothing there, not a corpus, an archive, a header without the columns needed.
    """
    names = ColumnNames(audio_column_name, text_column_name, needs_text)
    _refuse_archive(path)
    if not path.exists():
        raise UsageError(f"--corpus {path} does not exist: name a corpus folder, a manifest, or `demo`")
    if path.is_file():
        if path.suffix.lower() not in MANIFEST_SUFFIXES:
            raise UsageError(f"--corpus {path} is not a manifest: {', '.join(MANIFEST_SUFFIXES)} or a folder is needed")
        corpus = _open_tables("manifest", path.parent, [_Table(path, None)], names)
    elif not path.is_dir():
        raise UsageError(f"--corpus {path} is neither a file nor a folder: name a manifest or a corpus folder")
    else:
        corpus = _open_folder(path, train_split, names)
    ignored = {
        "--train_split validated": train_split == "validated" and corpus.kind != "common_voice",
        "--audio_column_name": audio_column_name and corpus.kind in ("librispeech", "audio"),
        "--text_column_name": text_column_name and corpus.kind == "librispeech",
    }
    notes = tuple(f"{flag} is ignored: the corpus is {corpus.kind}" for flag, yes in ignored.items() if yes)
    return replace(corpus, notes=corpus.notes + notes)


class AudioLocator:
    """Finds the file of a row and refuses what leads out of the corpus folder and of `audio_root`."""

    def __init__(self, folder: Path, audio_root: str | None) -> None:
        self._bases = [os.path.abspath(folder)]
        if audio_root is not None:
            if not os.path.isdir(audio_root):
                raise UsageError(f"--audio_root {audio_root} is not a folder: name the one that holds the audio")
            self._bases.append(os.path.abspath(audio_root))
        self._roots = [os.path.join(os.path.realpath(base), "") for base in self._bases]
        self._real_folder = functools.lru_cache(maxsize=1024)(os.path.realpath)

    def locate(self, row: SourceRow) -> tuple[ClipRequest, int]:
        """The clip of a row, and its file's modification time in ns; relative paths are tried in each base.

        Raises:
            ClipError: missing, outside_corpus or undecodable.
        """
        if not row.audio_path:
            raise ClipError("missing", "the row has no path")
        errors = []
        for base in self._bases:
            try:
                path, facts = self._check(os.path.join(base, row.audio_path))
                place = row.offset_seconds, row.duration_seconds, facts.st_size
                reaches = row.start_reach_seconds, row.end_reach_seconds
                return ClipRequest(path, *place, *reaches), facts.st_mtime_ns
            except ClipError as error:
                errors.append(error)
        raise errors[-1] if errors[-1].reason == "outside_corpus" else errors[0]

    def _check(self, path: str) -> tuple[str, os.stat_result]:
        folder, name = os.path.split(path)
        real = os.path.join(self._real_folder(folder), name) if name not in ("", ".", "..") else os.path.realpath(path)
        self._check_inside(real)
        try:
            facts = os.lstat(real)
            if stat.S_ISLNK(facts.st_mode):
                real = os.path.realpath(real)
                self._check_inside(real)
                facts = os.stat(real)
        except OSError as error:
            raise ClipError("missing", f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(facts.st_mode):
            raise ClipError("undecodable", f"{path} is not a regular file")
        return real, facts

    def _check_inside(self, real: str) -> None:
        if not os.path.join(real, "").startswith(tuple(self._roots)):
            raise ClipError("outside_corpus", real)


def sentence_key(text: str) -> str:
    """What makes two transcripts the same sentence: letters, marks and numbers, case folded."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return " ".join(folded.translate(_LETTERS_MARKS_NUMBERS).split())


def sentence_keys(texts: Sequence[str]) -> list[str]:
    """`sentence_key` of each, twice as fast: each step is taken once for all of them."""
    block = "\n".join(texts)
    if block.count("\n") != len(texts) - 1:
        return [sentence_key(text) for text in texts]  # none, or one of several lines
    folded = unicodedata.normalize("NFC", block).casefold()
    return [" ".join(key.split()) for key in folded.translate(_AND_LINE_FEEDS).split("\n")]


class _LettersMarksNumbers(dict[int, str]):
    """For str.translate: these stay, all else becomes a space. Filled as characters come: three times as fast."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = character if unicodedata.category(character)[0] in "LMN" else " "
        return self[code]


_LETTERS_MARKS_NUMBERS = _LettersMarksNumbers()
_AND_LINE_FEEDS = _LettersMarksNumbers({ord("\n"): "\n"})


# ---------------------------------------------------------------------------------------------------------------------
# Which layout


def _refuse_archive(path: Path) -> None:
    suffix = next((suffix for suffix in ARCHIVE_SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is not None and not path.is_dir():
        command = f"unzip {path}" if suffix == ".zip" else f"tar -xf {path} -C {path.parent}"
        raise UsageError(f"--corpus {path} is an archive: unpack it with `{command}` and name the unpacked folder")


def _open_folder(folder: Path, train_split: str, names: ColumnNames) -> Corpus:
    tables = _split_tables(folder)
    if (folder / "validated.tsv").is_file() or any("client_id" in _header(table.path) for table in tables):
        return _open_common_voice(folder, tables, train_split, names)
    first_version = [
        _Table(folder / f"cv-valid-{split}.csv", split)
        for split in SPLITS
        if (folder / f"cv-valid-{split}.csv").is_file()
    ]
    if first_version:
        tables = [_find_first_version_clips(table) for table in first_version]
        return _open_tables("common_voice_1", folder, tables, names)
    if tables:
        return _open_tables("manifest", folder, tables, names)
    for root in (folder, folder / "LibriSpeech"):
        if _librispeech_subsets(root):
            read, files = (functools.partial(of, root) for of in (_read_librispeech, _librispeech_files))
            return Corpus("librispeech", root, read, files=files)
    return _open_only_manifest(folder, names)


def _open_only_manifest(folder: Path, names: ColumnNames) -> Corpus:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file())
    named = [path for path in found if path.stem.lower() == "manifest"]
    chosen = named if len(named) == 1 else found
    if len(chosen) == 1:
        return _open_tables("manifest", folder, [_Table(chosen[0], None)], names)
    if not names.needs_text and (corpus := _open_audio_folder(folder)) is not None:
        return corpus
    if found:
        listed = ", ".join(path.name for path in found[:5]) + (", ..." if len(found) > 5 else "")
        raise UsageError(f"--corpus {folder} holds {len(found)} manifests ({listed}): name one of them")
    for path in sorted(folder.iterdir()):
        _refuse_archive(path)
        if path.is_dir() and _split_tables(path):
            raise UsageError(f"--corpus {folder} holds no corpus, its folder {path.name} does: name --corpus {path}")
    if not names.needs_text:
        raise UsageError(f"--corpus {folder} holds neither a manifest nor an audio file: name the folder that does")
    raise UsageError(
        f"--corpus {folder} holds no train.tsv (Common Voice), no manifest (.csv, .tsv, .jsonl) and no "
        "*/*/*.trans.txt (LibriSpeech): name the folder that does, or, for speech without text, give --untranscribed"
    )


def _split_tables(folder: Path) -> list["_Table"]:
    """`train.tsv`, `dev.tsv` and `test.tsv`, or the same as .csv or .jsonl, under their usual names."""
    for suffix in (".tsv", ".csv", ".jsonl", ".json"):
        found: dict[str, Path] = {}
        for name, split in SPLIT_NAMES.items():
            path = folder / f"{name}{suffix}"
            if path.is_file() and split in found:
                raise UsageError(f"{found[split]} and {path} are both the {split} split: remove or rename one")
            if path.is_file():
                found[split] = path
        if found:
            return [_Table(found[split], split) for split in SPLITS if split in found]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Common Voice


def _open_common_voice(folder: Path, tables: list["_Table"], train_split: str, names: ColumnNames) -> Corpus:
    tables = [_Table(table.path, table.split, "clips") for table in tables]
    if train_split == "train":
        if all(table.split != "train" for table in tables):
            raise UsageError(f"--corpus {folder} holds no train.tsv: use --train_split validated")
        return _open_tables("common_voice", folder, tables, names)
    if not (folder / "validated.tsv").is_file():
        raise UsageError(f"--train_split validated: {folder} holds no validated.tsv; use --train_split train")
    validated = _open_tables("common_voice", folder, [_Table(folder / "validated.tsv", "train", "clips")], names)
    held_out = _open_tables("common_voice", folder, [table for table in tables if table.split != "train"], names)
    return replace(
        validated,
        read=_Validated(validated.read, held_out.read).read,
        files=lambda: (*validated.files(), *held_out.files()),
    )


class _Validated:
    """All of validated.tsv less the sentences and speakers of dev and test, then dev and test as they are.

    Judging a row takes longer than reading it: the first whole pass keeps its verdicts, a byte per row.
    """

    def __init__(
        self, read_validated: Callable[[], Iterator[SourceRow]], read_held_out: Callable[[], Iterator[SourceRow]]
    ) -> None:
        self._read_validated, self._read_held_out = read_validated, read_held_out
        self._verdicts: bytearray | None = None

    def read(self) -> Iterator[SourceRow]:
        known = self._verdicts is not None
        for row, verdict in zip(self._read_validated(), self._verdicts, strict=False) if known else self._judge():
            yield replace(row, problem=HELD_OUT_PROBLEMS[verdict]) if verdict else row
        yield from self._read_held_out()

    def _judge(self) -> Iterator[tuple[SourceRow, int]]:
        sentences, speakers, verdicts = set(), set(), bytearray()
        for row in self._read_held_out():
            sentences.add(hash(sentence_key(row.text or "")))
            speakers.add(hash(row.speaker))
        speakers.discard(hash(""))
        for row in self._read_validated():
            verdict = 0
            if row.problem is None and hash(sentence_key(row.text or "")) in sentences:
                verdict = 1
            elif row.problem is None and hash(row.speaker) in speakers:
                verdict = 2
            verdicts.append(verdict)
            yield row, verdict
        self._verdicts = verdicts


def _find_first_version_clips(table: "_Table") -> "_Table":
    """Version 1 names clips `cv-valid-train/x.mp3`, unpacked beside the CSV or once more below a folder like it."""
    base, stem = table.path.parent, table.path.stem
    rows = itertools.islice(_read_cells(table.path), ROWS_TO_FIND_CLIPS)
    paths = [cells.get("filename", "") for cells, _ in rows if isinstance(cells, dict)]
    for audio_folder in ("", stem, f"{stem}/{stem}"):
        if any(path and (base / audio_folder / path).is_file() for path in paths):
            return _Table(table.path, table.split, audio_folder)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Tables: CSV (quoted as usual), TSV (never quoted, as Common Voice writes it), JSON Lines


@dataclass(frozen=True)
class _Table:
    """A file of rows, the split it stands for (None: a column may say) and the folder put before its audio paths."""

    path: Path
    split: str | None
    audio_folder: str = ""


@dataclass(frozen=True)
class _Columns:
    """Which column holds what, and the names under which the others are kept."""

    audio: str
    text: str | None
    speaker: str | None
    id: str | None
    split: str | None
    offset: str | None
    duration: str | None
    metadata: dict[str, str]


def _open_tables(kind: str, folder: Path, tables: list[_Table], names: ColumnNames) -> Corpus:
    for table in tables:
        _find_columns(_header(table.path), table, names)
    # Common Voice has no segments; a `duration` there describes the clip.
    segments = kind == "manifest"
    read = functools.partial(_read_tables, tables, names, segments)
    return Corpus(kind, folder, read, files=lambda: [table.path for table in tables])


def _read_tables(tables: list[_Table], names: ColumnNames, segments: bool) -> Iterator[SourceRow]:
    for table in tables:
        is_json = table.path.suffix.lower() in (".jsonl", ".json")
        columns = _find_columns(_header(table.path), table, names)
        keys = None
        for cells, line in _read_cells(table.path):
            # The first line of a JSONL file says which names are used; other keys may come and go.
            if is_json and isinstance(cells, dict) and cells.keys() != keys:
                keys = cells.keys()
                columns = _with_optional(columns, list(keys))
            yield _row(cells, line, columns, table, segments)


def _row(cells: dict[str, str] | str, line: int, columns: _Columns, table: _Table, segments: bool) -> SourceRow:
    if isinstance(cells, str):
        split = table.split or ("train" if columns and columns.split else None)
        return SourceRow(f"{table.path.name}:{line}", split, "", None, "", {}, problem=("bad_row", cells))
    path = _cell(cells, columns.audio)
    offset, duration, problem = _segment(cells, columns) if segments else (0.0, None, None)
    row_id = _cell(cells, columns.id)
    if not row_id:
        start = _cell(cells, columns.offset) if segments else ""
        row_id = (path or f"{table.path.name}:{line}") + (f"#{start}" if start else "")
    if table.audio_folder and path:
        # Common Voice before version 4 leaves the suffix out.
        path = f"{table.audio_folder}/{path if Path(path).suffix else path + '.mp3'}"
    text = cells.get(columns.text or "")
    blank_is_missing = table.path.suffix.lower() in (".csv", ".tsv")
    return SourceRow(
        id=row_id,
        split=table.split or _split_name(cells, line, columns, table),
        audio_path=path,
        text=None if text is None or (blank_is_missing and not text.strip()) else text.strip(),
        speaker=_cell(cells, columns.speaker),
        metadata={kept: cells[name] for name, kept in columns.metadata.items() if name in cells},
        offset_seconds=offset,
        duration_seconds=duration,
        problem=problem,
    )


def _cell(cells: dict[str, str], name: str | None) -> str:
    return "" if name is None else cells.get(name, "").strip()


def _split_name(cells: dict[str, str], line: int, columns: _Columns, table: _Table) -> str | None:
    if columns.split is None:
        return None
    value = _cell(cells, columns.split)
    if value.lower() not in SPLIT_NAMES:
        raise UsageError(
            f"{table.path} line {line}: the split is {value!r}, known are {', '.join(SPLIT_NAMES)}: "
            "rename it or remove the row"
        )
    return SPLIT_NAMES[value.lower()]


def _segment(cells: dict[str, str], columns: _Columns) -> tuple[float, float | None, tuple[str, str] | None]:
    numbers = []
    for name, lowest_allowed in ((columns.offset, True), (columns.duration, False)):
        value = _cell(cells, name)
        try:
            number = float(value) if value else None
        except ValueError:
            number = math.nan
        if number is not None and not (0 < number < math.inf or (number == 0 and lowest_allowed)):
            return 0.0, None, ("bad_row", f"{name} is {value!r}, seconds are needed")
        numbers.append(number)
    return numbers[0] or 0.0, numbers[1], None


def _find_columns(header: list[str], table: _Table, names: ColumnNames) -> _Columns:
    for name in header:
        if header.count(name) > 1:
            raise UsageError(f"{table.path} has two columns named {name!r}: rename one")
    split = None if table.split else _find(header, ("split",))
    audio = _need(header, table, "--audio_column_name", names.audio, AUDIO_COLUMNS)
    if names.needs_text:
        text = _need(header, table, "--text_column_name", names.text, TEXT_COLUMNS)
    else:
        text = _find(header, TEXT_COLUMNS)
    return _with_optional(_Columns(audio, text, None, None, split, None, None, {}), header)


def _find(header: list[str], usual: tuple[str, ...]) -> str | None:
    by_lower_name = {name.strip().lower(): name for name in reversed(header)}
    return next((by_lower_name[name] for name in usual if name in by_lower_name), None)


def _need(header: list[str], table: _Table, flag: str, wanted: str | None, usual: tuple[str, ...]) -> str:
    found = _find(header, usual) if wanted is None else (wanted if wanted in header else None)
    if found is None:
        what = f"column {wanted!r}" if wanted else f"column named {', '.join(usual)}"
        listed = ", ".join(header[:30])
        raise UsageError(f"{table.path} has no {what}; it has {listed}: name the right one with {flag}")
    return found


def _with_optional(columns: _Columns, header: list[str]) -> _Columns:
    """The same columns with those that a row may lack, and the names under which all others are kept."""
    speaker, row_id = (_find(header, usual) for usual in (SPEAKER_COLUMNS, ID_COLUMNS))
    kept: dict[str, str] = {}
    for position, name in enumerate(header):
        if name in (columns.text, speaker, row_id, columns.split):
            continue
        own_name = name.strip() or f"column_{position + 1}"
        while own_name in OWN_COLUMNS or own_name in kept.values():
            own_name = f"corpus_{own_name}"
        kept[name] = own_name
    offset, duration = (_find(header, (usual,)) for usual in ("offset", "duration"))
    return replace(columns, speaker=speaker, id=row_id, offset=offset, duration=duration, metadata=kept)


def _header(path: Path) -> list[str]:
    """Column names of a CSV or TSV file, keys of the first object of a JSONL file."""
    if path.suffix.lower() in (".jsonl", ".json"):
        cells = next((cells for cells, _ in _read_cells(path) if isinstance(cells, dict)), None)
        if cells is None:
            raise UsageError(
                f"{path} holds no JSON object: one per line is needed (`jq -c '.[]'` makes them of a list)"
            )
        return list(cells)
    rows = _read_csv_lines(path) if path.suffix.lower() == ".csv" else _read_tsv_lines(path)
    header = next((row for row, _ in rows), None)
    if header is None:
        raise UsageError(f"{path} is empty: a header line with column names is needed")
    if any("\0" in name for name in header):
        raise UsageError(f"{path}: a column name in the header holds a NUL character: remove it")
    return header


def _read_cells(path: Path) -> Iterator[tuple[dict[str, str] | str, int]]:
    """Cells by column name, or what is wrong with the row; and its line number."""
    if path.suffix.lower() in (".jsonl", ".json"):
        yield from _read_json_lines(path)
        return
    rows = _read_csv_lines(path) if path.suffix.lower() == ".csv" else _read_tsv_lines(path)
    header: list[str] | None = None
    for row, line in rows:
        if header is None:
            header = row
        elif len(row) != len(header):
            yield f"line {line} has {len(row)} columns, the header has {len(header)}", line
        elif any("\0" in cell for cell in row):
            yield f"line {line} holds a NUL character", line
        else:
            yield dict(zip(header, row, strict=True)), line


def _read_tsv_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    for line, number in _read_lines(path):
        if line.strip():
            yield line.rstrip("\r\n").split("\t"), number


def _read_csv_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    rows = csv.reader((line for line, _ in _read_lines(path)), strict=True)
    try:
        for row in rows:
            if row:
                yield row, rows.line_num
    except csv.Error as error:
        raise UsageError(f"{path} line {rows.line_num} is not valid CSV ({error}): mend the quoting there") from None


def _read_json_lines(path: Path) -> Iterator[tuple[dict[str, str] | str, int]]:
    for line, number in _read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                yield f"line {number} holds no JSON object", number
                continue
            cells = {name: _as_text(cell) for name, cell in value.items() if cell is not None}
            "".join((*cells, *cells.values())).encode()
        except (ValueError, RecursionError) as error:
            # UnicodeEncodeError is a ValueError: an escaped half of a surrogate pair is no text.
            yield f"line {number} is not valid JSON: {error}", number
            continue
        has_nul = any("\0" in cell for cell in (*cells, *cells.values()))
        yield f"line {number} holds a NUL character" if has_nul else cells, number


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Lines as text with their numbers; a byte order mark is dropped. Only a line feed ends a line."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8"), number
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{byte:02x} in line {number}: "
            f"convert it, `iconv -f ENCODING -t UTF-8 {path.name}` (ENCODING: WINDOWS-1252, UTF-16, ...)"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def read_texts(path: Path, text_column_name: str | None = None) -> Iterator[str | None]:
    """The texts of a file: of the text column of a CSV, TSV or JSONL table, else one per line.

    None stands for a row that is malformed or has no text.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or has no text column.
    """
    if path.suffix.lower() not in MANIFEST_SUFFIXES:
        yield from (line.strip() or None for line, _ in _read_lines(path))
        return
    column = _need(_header(path), _Table(path, None), "--text_column_name", text_column_name, TEXT_COLUMNS)
    for cells, _ in _read_cells(path):
        yield (cells.get(column) or "").strip() or None if isinstance(cells, dict) else None


# ---------------------------------------------------------------------------------------------------------------------
# LibriSpeech


def _librispeech_subsets(root: Path) -> list[tuple[Path, str | None]]:
    """Subset folders with the split that each stands for; `root` itself may be a subset."""
    if not root.is_dir():
        return []
    if next(root.glob("*/*/*.trans.txt"), None) is not None:
        return [(root, SPLIT_NAMES.get(root.name.split("-")[0].lower()))]
    found = []
    for folder in sorted(root.iterdir()):
        split = SPLIT_NAMES.get(folder.name.split("-")[0].lower())
        if split and folder.is_dir() and next(folder.glob("*/*/*.trans.txt"), None) is not None:
            found.append((folder, split))
    return found


def _librispeech_transcripts(root: Path) -> Iterator[tuple[Path, str | None, Path]]:
    for subset, split in _librispeech_subsets(root):
        for speaker in sorted(path for path in subset.iterdir() if path.is_dir()):
            for transcripts in sorted(speaker.glob("*/*.trans.txt")):
                yield subset, split, transcripts


def _librispeech_files(root: Path) -> Iterator[Path]:
    return (transcripts for _, _, transcripts in _librispeech_transcripts(root))


def _read_librispeech(root: Path) -> Iterator[SourceRow]:
    for subset, split, transcripts in _librispeech_transcripts(root):
        yield from _read_chapter(root, subset, split, transcripts)


def _read_chapter(root: Path, subset: Path, split: str | None, transcripts: Path) -> Iterator[SourceRow]:
    folder = transcripts.parent
    suffix = ".flac" if next(folder.glob("*.flac"), None) else ".wav"
    metadata = {"subset": subset.name, "chapter": folder.name}
    for line, _ in _read_lines(transcripts):
        row_id, _, text = line.strip().partition(" ")
        if row_id:
            audio_path = str((folder / f"{row_id}{suffix}").relative_to(root))
            yield SourceRow(row_id, split, audio_path, text.strip() or None, folder.parent.name, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Audio files without anything beside them


def _open_audio_folder(folder: Path) -> Corpus | None:
    """All audio files below a folder; None where there is none. The first folders are speakers, where it has several.

    What else lies there, and links to folders, which are not followed, is counted in a note.
    """
    count, others, first_folders = 0, 0, set()
    for path, is_audio in _walk(folder):
        count += is_audio
        others += not is_audio
        if is_audio and os.sep in path:
            first_folders.add(path.partition(os.sep)[0])
    if not count:
        return None
    notes = [f"{others:,} files without the suffix of an audio format, or links to folders, are left out"] * bool(
        others
    )
    has_speakers = len(first_folders) > 1
    if has_speakers:
        notes.append(f"speakers: the {len(first_folders)} folders of {folder.name} that hold audio")
    read = functools.partial(_read_audio_folder, folder, has_speakers)
    return Corpus("audio", folder, read, tuple(notes), lambda: _audio_folders(folder), count)


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Paths from the folder on, in order, and whether each is an audio file by its suffix."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None

    for place, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders.sort()
        links = [name for name in subfolders if os.path.islink(os.path.join(place, name))]
        for name in sorted(names + links):
            suffix = os.path.splitext(name)[1].lower()
            yield os.path.relpath(os.path.join(place, name), folder), suffix in AUDIO_SUFFIXES and name not in links


def _audio_folders(folder: Path) -> Iterator[Path]:
    """Those that hold audio files: their times change when one is added or removed."""
    for place, group in itertools.groupby(_walk(folder), lambda walked: os.path.dirname(walked[0])):
        if any(is_audio for _, is_audio in group):
            yield folder / place


def _read_audio_folder(folder: Path, has_speakers: bool) -> Iterator[SourceRow]:
    for path, is_audio in _walk(folder):
        if not is_audio:
            continue
        name = path.encode("utf-8", "backslashreplace").decode()
        problem = None if name == path else ("bad_row", "the name of the file is not UTF-8: rename it")
        speaker = name.partition(os.sep)[0] if has_speakers and os.sep in name else ""
        yield SourceRow(name, None, path, None, speaker, {}, problem=problem)
