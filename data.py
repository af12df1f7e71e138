"""Prepared shards as a map-style dataset, the plan of updates, and padding.

Dimension letters: B utterances of a micro-batch, S samples, T frames, H hidden size, L labels of a micro-batch.

The update comes first: `BatchPlan` lays out global updates as a pure function of (seed, epoch, utterances per update);
ranks and micro-batches are cuts of an update (`cut_update`), so another number of processes, a smaller memory or a
resume changes the cuts and never the updates.
"""

import contextlib
import hashlib
import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from audio import INT16_STEP, SAMPLE_RATE_HZ
from augment import Augmenter
from errors import UsageError
from integrity import (
    Damage,
    audio_of,
    check_audio,
    checked_numbers,
    damage_of_arrow,
    open_index,
    read_batch,
    read_sealed,
    refusing_other_schema,
    remake_command,
)
from model import draw_masks, masked_axes, num_frames
from stopping import ignore_stop_signals
from text import TextNormalizer, Vocabulary

if TYPE_CHECKING:
    from typing_extensions import Self

    from pretraining_data import PretrainingCollator
    from sampling import Sampling

# Length-sorted inside windows of this many updates: padding of 2 to 3 %, and a new partition every epoch.
UPDATES_PER_BUCKET = 64
# Micro-batches by seconds are evened out to this share of the limit.
EVENNESS = 0.02
# Same constant as transformers' Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm.
VARIANCE_FLOOR = 1e-7
TIME_MASKS = ("time_mask_BT", "other_time_mask_BT")
MASKS = (*TIME_MASKS, "feature_mask_BH", "other_feature_mask_BH")
# Streams of draws: of an utterance's masks, and of those of its second view. Augmentation has others, see augment.py.
# Without one the first copy draws as [seed, epoch, row] does, since numpy fills a seed up with zeros.
FIRST_VIEW, SECOND_VIEW = (), (7,)


@dataclass(frozen=True)
class Utterance:
    """One row of a shard: 16 kHz int16 audio of shape [S] (a view of the mapped file) and the text as found."""

    id: str
    audio: np.ndarray
    text: str
    corpus: str = ""
    """Name of the set that it is of, where there are several."""


class ShardDataset(Dataset):
    """All parts of one split, memory-mapped; holds a few numpy arrays and no audio.

    Sizes, schema and the checksum of all columns but the audio are checked here, a row's audio when it is read.

    Args:
        folder: `OUT/train`, `OUT/dev` or `OUT/test` as prepare.py wrote it.

    Raises:
        UsageError: the folder is missing, empty, unfinished or of another schema, or a part is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._parts = _find_parts(self.folder)
        self._readers: dict[int, _MappedPart] = {}
        batch_rows, owners, positions, numbers = [], [], [], []
        for number, part in enumerate(self._parts):
            with _naming_damage(part):
                of_part, numbers_of_part = checked_numbers(part)
            batch_rows += of_part
            owners += [number] * len(of_part)
            positions += range(len(of_part))
            numbers.append(numbers_of_part)
        if not any(batch_rows):
            raise UsageError(f"{self.folder} holds no utterance: {self.folder.parent / 'dropped.csv'} says why")
        # 48 bytes of a row, for which another pass would take half as long as this one.
        self._numbers = {name: np.concatenate([one.pop(name) for one in numbers]) for name in list(numbers[0])}
        self.num_samples = self._numbers["num_samples"]
        self._batch_starts = np.cumsum([0, *batch_rows[:-1]], dtype=np.int64)
        self._batch_parts = np.asarray(owners, np.int32)
        self._batch_positions = np.asarray(positions, np.int32)

    def __len__(self) -> int:
        return len(self.num_samples)

    def __getitem__(self, row: int) -> Utterance:
        if not 0 <= row < len(self):
            raise IndexError(row)
        part, position, offset = self._locate(row)
        with _naming_damage(self._parts[part]):
            mapped = self._mapped(part)
            batch = read_batch(mapped.reader, position)
            samples, utterance_id = audio_of(batch, offset), batch.column("id")[offset].as_py()
            mapped.fetch(samples)
            if not check_audio(samples, batch.column("audio_sha256")[offset].as_py()):
                raise Damage(f"row {utterance_id} of data.arrow: its audio differs from its checksum")
            return Utterance(utterance_id, samples, batch.column("text")[offset].as_py())

    def __getstate__(self) -> dict:
        # Readers hold mapped memory and are opened again by each worker.
        return self.__dict__ | {"_readers": {}}

    @property
    def seconds(self) -> float:
        """Audio of the split in seconds."""
        return float(self.num_samples.sum(dtype=np.int64)) / SAMPLE_RATE_HZ

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, metadata of the corpus included."""
        return self._schema.names

    @property
    def _schema(self) -> pa.Schema:
        with _naming_damage(self._parts[0]):
            return self._mapped(0).reader.schema

    @cached_property
    def fingerprint(self) -> str:
        """One hash over the checksums of the parts."""
        checksums = []
        for part in self._parts:
            with _naming_damage(part):
                checksums.append(read_sealed(part / "part.json")["sha256"])
        return hashlib.sha256("".join(checksums).encode()).hexdigest()

    def column(self, name: str, rows: np.ndarray | None = None) -> Iterator[str]:
        """The values of one column in row order, read batch by batch; of `rows` (ascending) alone where they are given.

        Raises:
            UsageError: when the corpus has no such column.
        """
        self._require_column(name)
        rows = np.arange(len(self)) if rows is None else rows
        bounds = np.append(np.searchsorted(rows, self._batch_starts), len(rows))
        batches = np.flatnonzero(np.diff(bounds))
        for batch, values in zip(batches, self._read(batches, (name,)), strict=True):
            wanted = rows[bounds[batch] : bounds[batch + 1]] - self._batch_starts[batch]
            of_batch = values.column(0).to_pylist()  # Arrow's own `take` wants an array, whose making imports pandas.
            yield from (of_batch[row] for row in wanted.tolist())

    def numpy_column(self, name: str) -> np.ndarray:
        """The values of a numeric column in row order, [N]; not to be changed.

        Raises:
            UsageError: when the corpus has no such column.
        """
        self._require_column(name)
        return self._numbers[name]

    def _require_column(self, name: str) -> None:
        if name not in self.column_names:
            raise UsageError(f"{self.folder} has no column {name!r}; it has {', '.join(self.column_names)}")

    def _read(self, batches: np.ndarray, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These record batches, ascending, with these columns alone."""
        for number, of_part in itertools.groupby(batches.tolist(), lambda batch: int(self._batch_parts[batch])):
            part = self._parts[number]
            with _naming_damage(part), open_index(part / "data.arrow", names) as reader:
                for batch in of_part:
                    yield read_batch(reader, int(self._batch_positions[batch]))

    def _locate(self, row: int) -> tuple[int, int, int]:
        """The part, its record batch and the place in it."""
        batch = int(np.searchsorted(self._batch_starts, row, side="right")) - 1
        return int(self._batch_parts[batch]), int(self._batch_positions[batch]), row - int(self._batch_starts[batch])

    def _mapped(self, part: int) -> "_MappedPart":
        if part not in self._readers:
            self._readers[part] = _MappedPart(self._parts[part] / "data.arrow")
        return self._readers[part]


def has_utterances(folder: Path) -> bool:
    """Whether a split was prepared and any of its rows could be used."""
    if not folder.is_dir():
        return False
    for part in _find_parts(folder):
        with _naming_damage(part):
            if read_sealed(part / "part.json")["rows"]:
                return True
    return False


def _find_parts(folder: Path) -> list[Path]:
    """The parts that `prepare.json`, the mark of a finished preparation, counts for this split."""
    data_dir = folder.parent
    found = {part.name for part in folder.glob("part_*")}
    if not found and not (data_dir / "prepare.json").exists():
        raise UsageError(f"{folder} holds no prepared data: run python prepare.py --corpus ... --data_dir {data_dir}")
    try:
        with refusing_other_schema(data_dir):
            count = int(read_sealed(data_dir / "prepare.json")["splits"][folder.name]["parts"])
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{data_dir} is not finished ({error}): run the same prepare.py command again, it goes on where it stopped"
        ) from error
    expected = [f"part_{number}" for number in range(1, count + 1)]
    missing, extra = [name for name in expected if name not in found], sorted(found - set(expected))
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}: run prepare.py again, it makes what is missing")
    if extra:
        raise UsageError(f"{folder} holds {', '.join(extra)}, which prepare.json does not count: move it elsewhere")
    if not expected:
        raise UsageError(
            f"the {folder.name} split of {data_dir} is empty: prepare a corpus that has one, or divide it by --split_by"
        )
    return [folder / name for name in expected]


class _MappedPart:
    """A mapped data.arrow.

    Mapped by Python and not by Arrow, which asks the system for all 16 MB of the batch that a clip is read from: with
    a corpus beyond the memory a hundred times what training needs.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = pa.py_buffer(self._pages)
        self._address = buffer.address
        self.reader = pa.ipc.open_file(pa.BufferReader(buffer))

    def fetch(self, samples: np.ndarray) -> None:
        """Ask the system for all pages of a clip at once, since it brings single ones where rows are read at random."""
        if not len(samples) or not hasattr(mmap, "MADV_WILLNEED"):
            return
        begin = samples.ctypes.data - self._address
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_WILLNEED, start, begin + samples.nbytes - start)


@contextlib.contextmanager
def _naming_damage(part: Path) -> Iterator[None]:
    """Whatever is wrong with a file becomes one line that names the part and the command that makes it again."""
    data_dir = part.parents[1]
    try:
        with refusing_other_schema(data_dir), damage_of_arrow():
            yield
    except Damage as damage:
        raise UsageError(f"{part} is damaged ({damage}): make it again with {remake_command(data_dir)}") from damage


@dataclass(frozen=True)
class BatchPlan:
    """The updates of a run: which utterances belong to which optimizer step, for every number of processes.

    Attributes:
        rows: dataset rows that take part, [N].
        num_samples: their lengths, [N].
        utterances_per_update: size of every update but the last of an epoch, which takes what is left.
        seed: decides the order together with the epoch.
        sampling: how often an epoch has each of them; once without.
    """

    rows: np.ndarray
    num_samples: np.ndarray
    utterances_per_update: int
    seed: int
    sampling: "Sampling | None" = None

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one pass."""
        return math.ceil(len(self.rows) / self.utterances_per_update)

    @property
    def samples_per_epoch(self) -> float:
        """Samples of audio of one pass; the mean of all passes where some clips come more often than others."""
        if self.sampling is None:
            return float(self.num_samples.sum(dtype=np.int64))
        return self.sampling.samples_per_epoch(self.num_samples)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Positions in `rows` for one epoch, [N]; update u is the slice [u * size, (u + 1) * size).

        A random order, sorted by length inside windows of UPDATES_PER_BUCKET updates, with the order of the full
        updates shuffled; the short last update is drawn at random too.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.rows))
        if self.sampling is not None:
            order = self.sampling.draw(epoch)[order]
        size = self.utterances_per_update
        num_full = len(order) // size
        full, rest = order[: num_full * size], order[num_full * size :]
        window = size * UPDATES_PER_BUCKET
        for start in range(0, len(full), window):
            part = full[start : start + window]
            full[start : start + window] = self._by_length(part)
        shuffled = full.reshape(num_full, size)[rng.permutation(num_full)]
        return np.concatenate([shuffled.reshape(-1), rest])

    def _by_length(self, part: np.ndarray) -> np.ndarray:
        """Positions sorted by length; a clip that is there several times is spread, not a neighbour of itself.

        Sorted, they are dealt like cards into as many hands as the commonest of them has copies, which lie one behind
        the other, every second one from long to short: no update meets a clip again within one hand.
        """
        most_copies = int(np.unique(part, return_counts=True)[1].max()) if self.sampling is not None else 1
        if most_copies == 1:
            return part[np.argsort(self.num_samples[part], kind="stable")]
        ordered = part[np.lexsort((part, self.num_samples[part]))]
        hands = [ordered[first::most_copies] for first in range(most_copies)]
        return np.concatenate([hand[:: -1 if number % 2 else 1] for number, hand in enumerate(hands)])

    def updates(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (step, epoch, positions) for the optimizer steps first_step .. last_step - 1, counted from 0.

        The position in the data is the step itself, so a resume costs one epoch's permutation and no skipping.
        """
        for step, epoch, positions, _ in self.updates_with_copies(first_step, last_step):
            yield step, epoch, positions

    def updates_with_copies(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """The same with how often each utterance has come before in its epoch, copies, for draws that differ."""
        epoch, order, copies = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)
        for step in range(first_step, last_step):
            if step // self.updates_per_epoch != epoch:
                epoch = step // self.updates_per_epoch
                order = self.epoch_order(epoch)
                copies = np.zeros(len(order), np.int64) if self.sampling is None else _count_copies(order)
            start = step % self.updates_per_epoch * self.utterances_per_update
            update = slice(start, start + self.utterances_per_update)
            yield step, epoch, order[update], copies[update]


def _count_copies(order: np.ndarray) -> np.ndarray:
    """How often each value stands further in front, [N]."""
    by_value = np.argsort(order, kind="stable")
    _, counts = np.unique(order, return_counts=True)
    copies = np.empty(len(order), np.int64)
    copies[by_value] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return copies


def cut_update(
    num_samples: np.ndarray, num_processes: int, max_utterances: int, max_batch_samples: float | None = None
) -> list[list[np.ndarray]]:
    """Cut one update into micro-batches: `cuts[micro_step][rank]` holds positions into `num_samples`.

    Sorted by length, longest first, so that rows of a micro-batch pad little and the ranks of a micro-step do like
    work. Every rank gets the same number of micro-batches; a cut may be empty when there are fewer utterances than
    ranks.

    Args:
        num_samples: lengths of the utterances of the update.
        num_processes: ranks that share the update.
        max_utterances: limit of a micro-batch when `max_batch_samples` is None.
        max_batch_samples: limit of rows x longest row; one longer utterance forms a micro-batch of its own.
    """
    if not len(num_samples):
        return []
    order = np.argsort(-num_samples.astype(np.int64), kind="stable")
    if max_batch_samples is None:
        num_chunks = math.ceil(len(order) / (max_utterances * num_processes)) * num_processes
        chunks = np.array_split(order, num_chunks)
    else:
        chunks = _even_chunks(order, num_samples, max_batch_samples, num_processes)
        chunks = _pad_chunks(chunks, num_samples, num_processes)
    return [chunks[start : start + num_processes] for start in range(0, len(chunks), num_processes)]


def _even_chunks(
    order: np.ndarray, num_samples: np.ndarray, max_batch_samples: float, num_processes: int
) -> list[np.ndarray]:
    """As few chunks as the limit allows, and as even as so many can be: the last rank is not left the remainder.

    Bisects for the smallest limit that needs no more chunks, counted in rounds of all ranks. The longest utterance,
    which comes first, is the least that a limit can be.
    """
    chunks = _chunks_by_samples(order, num_samples, max_batch_samples)
    wanted = math.ceil(len(chunks) / num_processes) * num_processes
    longest = float(num_samples[order[0]])
    too_small, enough = longest, min(max_batch_samples, longest * len(order))
    while enough - too_small > EVENNESS * enough:
        middle = (too_small + enough) / 2
        found = _chunks_by_samples(order, num_samples, middle)
        if len(found) <= wanted:
            chunks, enough = found, middle
        else:
            too_small = middle
    return chunks


def _chunks_by_samples(order: np.ndarray, num_samples: np.ndarray, max_batch_samples: float) -> list[np.ndarray]:
    chunks, start = [], 0
    while start < len(order):
        count = max(1, int(max_batch_samples // max(1, num_samples[order[start]])))
        chunks.append(order[start : start + count])
        start += count
    return chunks


def _pad_chunks(chunks: list[np.ndarray], num_samples: np.ndarray, num_processes: int) -> list[np.ndarray]:
    """Split the heaviest chunks until every rank has as many; empty ones where nothing is left to split."""
    chunks = list(chunks)
    while len(chunks) % num_processes:
        weights = [len(chunk) * int(num_samples[chunk[0]]) if len(chunk) > 1 else 0 for chunk in chunks]
        heaviest = int(np.argmax(weights))
        if weights[heaviest] == 0:
            chunks.append(np.zeros(0, np.int64))
            continue
        half = math.ceil(len(chunks[heaviest]) / 2)
        chunks[heaviest : heaviest + 1] = [chunks[heaviest][:half], chunks[heaviest][half:]]
    return chunks


class PaddedBatch:
    """What the micro-batches of training and of pre-training share: the audio, and how their rows are cut apart.

    Subclasses are dataclasses with at least ids, rows, input_values_BS, sample_lengths_B and frame_lengths_B.
    """

    # What the model reads; lengths stay on the CPU, where they steer the shapes.
    on_device: ClassVar[tuple[str, ...]]
    # What the loss of each row is a sum over, int64 on the CPU.
    num_targets_B: torch.Tensor

    @property
    def num_samples(self) -> int:
        """Samples of audio without padding."""
        return int(self.sample_lengths_B.sum())

    @property
    def num_padded_samples(self) -> int:
        """Samples with padding."""
        return self.input_values_BS.numel()

    def split(self, max_padded_samples: int) -> list["Self"]:
        """The same rows in consecutive batches of at most `max_padded_samples` each, or of one row, padded anew."""
        pieces, start = [], 0
        lengths = self.sample_lengths_B.tolist()
        while start < len(lengths):
            stop = start + 1
            while stop < len(lengths) and (stop + 1 - start) * max(lengths[start : stop + 1]) <= max_padded_samples:
                stop += 1
            pieces.append(self if (start, stop) == (0, len(lengths)) else self._rows(start, stop))
            start = stop
        return pieces

    def _rows(self, start: int, stop: int) -> "Self":
        samples = int(self.sample_lengths_B[start:stop].max())
        return replace(
            self,
            ids=self.ids[start:stop],
            rows=self.rows[start:stop],
            input_values_BS=self.input_values_BS[start:stop, :samples].contiguous(),
            sample_lengths_B=self.sample_lengths_B[start:stop],
            frame_lengths_B=self.frame_lengths_B[start:stop],
            **self._fields_of_rows(start, stop),
        )

    def _fields_of_rows(self, start: int, stop: int) -> dict[str, Any]:
        """Those of the subclass's own fields that rows start .. stop have another value of."""
        raise NotImplementedError

    def to(self, device: torch.device) -> "Self":
        """The tensors that the model reads, on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in self.on_device
            if getattr(self, name) is not None
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Self":
        """Page-locked copies, called by DataLoader."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in tensors.items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True)
class Batch(PaddedBatch):
    """One padded micro-batch.

    Attributes:
        ids: of the utterances, B.
        rows: of the dataset, int [B].
        texts: normalised references, B.
        raw_texts: references as found, B.
        input_values_BS: float32 waveforms, zero behind each row's end.
        sample_lengths_B: int64 lengths of the rows.
        frame_lengths_B: int64 frames that the encoder makes of them.
        labels_L: int64 labels of all rows, one behind the other.
        label_lengths_B: int64 number of labels per row.
        time_mask_BT: frames to mask in training, or None.
        feature_mask_BH: features to mask in training, or None.
        num_views: 2 in consistency training, where each utterance passes twice through the layers.
        other_time_mask_BT, other_feature_mask_BH: of the second view.
    """

    ids: list[str]
    rows: np.ndarray
    texts: list[str]
    raw_texts: list[str]
    input_values_BS: torch.Tensor
    sample_lengths_B: torch.Tensor
    frame_lengths_B: torch.Tensor
    labels_L: torch.Tensor
    label_lengths_B: torch.Tensor
    time_mask_BT: torch.Tensor | None = None
    feature_mask_BH: torch.Tensor | None = None
    num_views: int = 1
    other_time_mask_BT: torch.Tensor | None = None
    other_feature_mask_BH: torch.Tensor | None = None

    on_device = ("input_values_BS", "labels_L", *MASKS)

    @property
    def num_targets_B(self) -> torch.Tensor:
        """Labels of each row."""
        return self.label_lengths_B

    def _fields_of_rows(self, start: int, stop: int) -> dict[str, Any]:
        label_ends = [0, *self.label_lengths_B.cumsum(0).tolist()]
        # As many frames of the masks as the shorter rows have; which those are is known where they were drawn.
        frames = int(self.frame_lengths_B[start:stop].max())
        masks = {name: getattr(self, name) for name in MASKS if getattr(self, name) is not None}
        masks = {name: mask[start:stop, : frames if name in TIME_MASKS else None] for name, mask in masks.items()}
        return {
            "texts": self.texts[start:stop],
            "raw_texts": self.raw_texts[start:stop],
            "labels_L": self.labels_L[label_ends[start] : label_ends[stop]],
            "label_lengths_B": self.label_lengths_B[start:stop],
            **masks,
        }


def hear(
    utterances: Sequence[Utterance],
    rows: np.ndarray,
    epoch: int | None,
    copies: np.ndarray,
    augmenter: Augmenter | None,
    do_normalize: bool,
) -> tuple[np.ndarray, list[int]]:
    """The waveforms of a micro-batch as the model gets them, padded: float32 [B, S], and their lengths.

    Augmented where `epoch` is given (training) and there is an augmenter; scaled to zero mean and unit variance where
    the checkpoint's feature extractor says so.
    """
    signals = [utterance.audio.astype(np.float32) * np.float32(INT16_STEP) for utterance in utterances]
    if epoch is not None and augmenter is not None:
        places = zip(signals, rows.tolist(), copies.tolist(), strict=True)
        signals = [augmenter(signal_S, row, epoch, copy) for signal_S, row, copy in places]
    lengths = [len(signal_S) for signal_S in signals]
    padded = np.zeros((len(utterances), max(lengths)), np.float32)
    for row, signal_S in zip(padded, signals, strict=True):
        row[: len(signal_S)] = standardise(signal_S) if do_normalize else signal_S
    return padded, lengths


def standardise(signal_S: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as transformers' Wav2Vec2FeatureExtractor."""
    return (signal_S - signal_S.mean()) / np.sqrt(signal_S.var() + VARIANCE_FLOOR)


@dataclass(frozen=True)
class Collator:
    """Turn utterances into a `Batch`: labels, augmentation, waveform scaling, padding and SpecAugment masks.

    Attributes:
        normalizer: text rules of the run.
        vocabulary: labels of the model.
        do_normalize: zero mean and unit variance per utterance, as the checkpoint's feature extractor says.
        hf_config: configuration of the encoder, for frame counts and masks.
        seed: masks are a function of (seed, epoch, row, copy), whatever the cut.
        augmenter: changes waveforms in training; None for none.
        num_views: 2 in consistency training, where masks are drawn twice.
    """

    normalizer: TextNormalizer
    vocabulary: Vocabulary
    do_normalize: bool
    hf_config: object
    seed: int
    augmenter: Augmenter | None = None
    num_views: int = 1

    def __call__(
        self,
        utterances: list[Utterance],
        rows: np.ndarray,
        epoch: int | None = None,
        copies: np.ndarray | None = None,
    ) -> Batch:
        """Pad `utterances`, found at `rows` of the dataset.

        Augmented and masked where `epoch` is given (training); `copies` says how often each came before in the epoch.
        """
        texts = [self._normalise(utterance) for utterance in utterances]
        labels = [self.vocabulary.encode(text) for text in texts]
        copies = np.zeros(len(rows), np.int64) if copies is None else copies
        padded, lengths = hear(utterances, rows, epoch, copies, self.augmenter, self.do_normalize)
        kernels, strides = self.hf_config.conv_kernel, self.hf_config.conv_stride
        frames = [num_frames(length, kernels, strides) for length in lengths]
        of_training = {} if epoch is None else self._masks(frames, rows, epoch, copies) | {"num_views": self.num_views}
        return Batch(
            ids=[utterance.id for utterance in utterances],
            rows=rows,
            texts=texts,
            raw_texts=[utterance.text for utterance in utterances],
            input_values_BS=torch.from_numpy(padded),
            sample_lengths_B=torch.tensor(lengths),
            frame_lengths_B=torch.tensor(frames),
            labels_L=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            label_lengths_B=torch.tensor([len(row) for row in labels]),
            **of_training,
        )

    def _normalise(self, utterance: Utterance) -> str:
        rules = self.normalizer.for_set(utterance.corpus) if utterance.corpus else self.normalizer
        return rules(utterance.text)

    def lengths(self, rows: np.ndarray, num_samples: np.ndarray, epoch: int, copies: np.ndarray) -> np.ndarray:
        """Samples that training utterances of `num_samples` will have, [N]: known before any is read."""
        return num_samples if self.augmenter is None else self.augmenter.lengths(rows, epoch, copies)

    def _masks(
        self, frames: list[int], rows: np.ndarray, epoch: int, copies: np.ndarray
    ) -> dict[str, torch.Tensor | None]:
        """The fields of a Batch that hold masks."""
        time_mask, feature_mask = self._draw(frames, rows, epoch, copies, FIRST_VIEW)
        masks = {"time_mask_BT": time_mask, "feature_mask_BH": feature_mask}
        if self.num_views == 2:
            time_mask, feature_mask = self._draw(frames, rows, epoch, copies, SECOND_VIEW)
            masks |= {"other_time_mask_BT": time_mask, "other_feature_mask_BH": feature_mask}
        return masks

    def _draw(
        self, frames: list[int], rows: np.ndarray, epoch: int, copies: np.ndarray, stream: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        config = self.hf_config
        masks_time, masks_features = masked_axes(config)
        if not (masks_time or masks_features):
            return None, None
        time_mask = np.zeros((len(frames), max(frames)), bool)
        feature_mask = np.zeros((len(frames), config.hidden_size), bool)
        for index, (frame_count, row, copy) in enumerate(zip(frames, rows, copies, strict=True)):
            rng = np.random.default_rng([self.seed, epoch, int(row), int(copy), *stream])
            time_mask[index, :frame_count], feature_mask[index] = draw_masks(
                frame_count, config.hidden_size, config, rng
            )
        return (
            torch.from_numpy(time_mask) if masks_time else None,
            torch.from_numpy(feature_mask) if masks_features else None,
        )


@dataclass(frozen=True)
class Update:
    """This rank's share of one optimizer step.

    Attributes:
        step: optimizer steps before this one, from 0.
        epoch: pass over the data, from 0.
        num_labels: labels (in pre-training: masked frames) of the whole update over all ranks; the loss is divided
            by it.
        num_utterances: utterances of the whole update over all ranks.
        micro_batches: this rank's cuts, longest first; a rank without utterances has none.
    """

    step: int
    epoch: int
    num_labels: int
    num_utterances: int
    micro_batches: list[PaddedBatch]

    def pin_memory(self) -> "Update":
        """Page-locked copies, called by DataLoader."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(frozen=True)
class CutSettings:
    """How updates are cut for this rank: at most `max_utterances`, or `max_batch_seconds` of padded audio."""

    rank: int
    num_processes: int
    max_utterances: int
    max_batch_seconds: float | None = None

    @property
    def max_batch_samples(self) -> float | None:
        """The limit in samples."""
        return None if self.max_batch_seconds is None else self.max_batch_seconds * SAMPLE_RATE_HZ


class _Updates(Dataset):
    """What the loader's workers hold: from (step, epoch, positions, copies) to an `Update` of this rank."""

    def __init__(
        self,
        dataset: ShardDataset,
        plan: BatchPlan,
        num_labels: np.ndarray | None,
        collate: "Collator | PretrainingCollator",
        cut: CutSettings,
    ) -> None:
        self.dataset, self.plan, self.num_labels, self.collate, self.cut = dataset, plan, num_labels, collate, cut

    def __getitem__(self, planned: tuple[int, int, np.ndarray, np.ndarray]) -> Update:
        step, epoch, positions, copies = planned
        rows = self.plan.rows[positions]
        lengths = self.collate.lengths(rows, self.plan.num_samples[positions], epoch, copies)
        cuts = cut_update(
            lengths,
            self.cut.num_processes,
            self.cut.max_utterances,
            self.cut.max_batch_samples,
        )
        micro_batches = []
        for of_rank in cuts:
            own = of_rank[self.cut.rank]
            if len(own):
                utterances = [self.dataset[int(row)] for row in rows[own]]
                micro_batches.append(self.collate(utterances, rows[own], epoch, copies[own]))
        if self.num_labels is None:
            labels = self.collate.count_targets(rows, lengths, epoch, copies)
        else:
            labels = self.num_labels[positions]
        return Update(step, epoch, int(labels.sum()), len(positions), micro_batches)


class _Batches(Dataset):
    """What the evaluation loader's workers hold: from rows to a `Batch`."""

    def __init__(self, dataset: ShardDataset, collate: "Collator | PretrainingCollator") -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, rows: np.ndarray) -> PaddedBatch:
        return self.collate([self.dataset[int(row)] for row in rows], rows)


class _PlannedUpdates:
    """Sampler: the steps of the run that are still to do."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self.plan, self.first_step, self.last_step = plan, first_step, last_step

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        return self.plan.updates_with_copies(self.first_step, self.last_step)

    def __len__(self) -> int:
        return self.last_step - self.first_step


def training_loader(
    dataset: ShardDataset,
    plan: BatchPlan,
    num_labels: np.ndarray | None,
    collate: "Collator | PretrainingCollator",
    cut: CutSettings,
    first_step: int,
    last_step: int,
    num_workers: int,
) -> DataLoader:
    """One loader for the whole run: yields the `Update`s first_step .. last_step - 1 across epochs.

    Args:
        dataset: the training split.
        plan: the updates.
        num_labels: labels per utterance of the plan, [N]; None to ask `collate.count_targets`, update by update.
        collate: pads a micro-batch.
        cut: this rank's share.
        first_step: optimizer steps already done.
        last_step: optimizer steps of the run.
        num_workers: loading processes; they hold no state, every draw is a function of (seed, epoch, row).
    """
    updates = _Updates(dataset, plan, num_labels, collate, cut)
    return _loader(updates, _PlannedUpdates(plan, first_step, last_step), num_workers)


def evaluation_loader(
    dataset: ShardDataset,
    rows: np.ndarray,
    collate: "Collator | PretrainingCollator",
    cut: CutSettings,
    num_workers: int,
) -> DataLoader:
    """Yield this rank's batches of `rows`: each row on one rank, once; ranks may differ by one batch."""
    one_process = cut_update(dataset.num_samples[rows], 1, cut.max_utterances, cut.max_batch_samples)
    batches = [rows[positions] for (positions,) in one_process]
    return _loader(_Batches(dataset, collate), batches[cut.rank :: cut.num_processes], num_workers)


def _loader(dataset: Dataset, sampler: object, num_workers: int) -> DataLoader:
    # A generator of its own: iter(DataLoader) would draw from torch's global one.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator().manual_seed(0),
    )
