"""Batches for pre-training: which frames are masked, and between which codes the model must choose for each of them.

Dimension letters: B utterances, S samples, T frames, H hidden size, M masked frames of an utterance, K distractors.

Every draw is a function of (seed, epoch, row, copy), so that neither the cut of an update nor a resume changes it; in
evaluation it is one of the row alone, so that losses of two evaluations can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from augment import Augmenter
from data import PaddedBatch, Utterance, hear
from levers import PretrainingMasks
from model import draw_masks, num_frames

# Streams of draws beside those of data.py and augment.py. Masks are drawn as for CTC training, without one.
DISTRACTORS, GUMBEL = (11,), (12,)
# Stands for (seed, epoch) in evaluation, whatever the run.
EVALUATION = (20_061_477, 0)  # the paper's number


def shortest_samples(masks: PretrainingMasks, hf_config: PretrainedConfig) -> int:
    """Samples of the shortest clip of which every draw masks something: shorter ones teach nothing."""
    samples = max(masks.mask_time_length, 2)
    for kernel, stride in zip(reversed(hf_config.conv_kernel), reversed(hf_config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


@dataclass(frozen=True)
class PretrainingBatch(PaddedBatch):
    """One padded micro-batch without text.

    Attributes:
        ids: of the utterances, B.
        rows: of the dataset, int [B].
        input_values_BS: float32 waveforms, zero behind each row's end.
        sample_lengths_B: int64 lengths of the rows.
        frame_lengths_B: int64 frames that the encoder makes of them.
        time_mask_BT: frames to predict.
        masked_frames_BM: int64, the same as frame numbers, ascending; 0 behind a row's last.
        num_masked_B: int64 frames to predict per row; 0 for a clip of which fewer than two are masked.
        distractors_BMK: int32, for each masked frame which others of its row it is told apart from, as positions
            among them (0 .. M - 1).
        gumbel_seeds: of each row's noise in the choice of codes, B; None in evaluation, which has none.
        feature_mask_BH: features to mask, or None.
    """

    ids: list[str]
    rows: np.ndarray
    input_values_BS: torch.Tensor
    sample_lengths_B: torch.Tensor
    frame_lengths_B: torch.Tensor
    time_mask_BT: torch.Tensor
    masked_frames_BM: torch.Tensor
    num_masked_B: torch.Tensor
    distractors_BMK: torch.Tensor
    gumbel_seeds: list[int] | None = None
    feature_mask_BH: torch.Tensor | None = None

    on_device = ("input_values_BS", "time_mask_BT", "masked_frames_BM", "distractors_BMK", "feature_mask_BH")

    @property
    def num_targets_B(self) -> torch.Tensor:
        """Frames to predict of each row."""
        return self.num_masked_B

    @property
    def num_masked(self) -> int:
        """Frames to predict."""
        return int(self.num_masked_B.sum())

    def _fields_of_rows(self, start: int, stop: int) -> dict[str, Any]:
        frames, masked = (int(counts[start:stop].max()) for counts in (self.frame_lengths_B, self.num_masked_B))
        return {
            "time_mask_BT": self.time_mask_BT[start:stop, : max(frames, 1)],
            "masked_frames_BM": self.masked_frames_BM[start:stop, :masked],
            "num_masked_B": self.num_masked_B[start:stop],
            "distractors_BMK": self.distractors_BMK[start:stop, :masked],
            "gumbel_seeds": None if self.gumbel_seeds is None else self.gumbel_seeds[start:stop],
            "feature_mask_BH": None if self.feature_mask_BH is None else self.feature_mask_BH[start:stop],
        }


@dataclass(frozen=True)
class PretrainingCollator:
    """Turn utterances into a `PretrainingBatch`; their texts are not looked at.

    Attributes:
        do_normalize: zero mean and unit variance per utterance, as the checkpoint's feature extractor says.
        hf_config: configuration of the model, for frame counts and the number of distractors.
        masks: what is to be predicted.
        seed: of the run.
        augmenter: changes waveforms in training; None for none.
    """

    do_normalize: bool
    hf_config: PretrainedConfig
    masks: PretrainingMasks
    seed: int
    augmenter: Augmenter | None = None

    def __call__(
        self,
        utterances: Sequence[Utterance],
        rows: np.ndarray,
        epoch: int | None = None,
        copies: np.ndarray | None = None,
    ) -> PretrainingBatch:
        """Pad `utterances`, found at `rows` of the dataset; `epoch` and `copies` as for `data.Collator`."""
        copies = np.zeros(len(rows), np.int64) if copies is None else copies
        padded_BS, lengths = hear(utterances, rows, epoch, copies, self.augmenter, self.do_normalize)
        frames = self._frames(np.asarray(lengths)).tolist()
        masks = [
            self._draw_masks(count, row, epoch, copy) for count, row, copy in zip(frames, rows, copies, strict=True)
        ]
        masked = [np.flatnonzero(time_mask_T) for time_mask_T, _ in masks]
        most = max(map(len, masked))
        time_mask_BT = np.zeros((len(rows), max(*frames, 1)), bool)
        masked_frames_BM = np.zeros((len(rows), most), np.int64)
        distractors_BMK = np.zeros((len(rows), most, self.hf_config.num_negatives), np.int32)
        for index, (of_row, row, copy) in enumerate(zip(masked, rows, copies, strict=True)):
            time_mask_BT[index, of_row] = True
            masked_frames_BM[index, : len(of_row)] = of_row
            rng = self._generator(row, epoch, copy, DISTRACTORS)
            distractors_BMK[index, : len(of_row)] = draw_distractors(len(of_row), self.hf_config.num_negatives, rng)
        feature_mask_BH = None
        if epoch is not None and self.masks.mask_feature_prob > 0:
            feature_mask_BH = torch.from_numpy(np.stack([feature_mask_H for _, feature_mask_H in masks]))
        return PretrainingBatch(
            ids=[utterance.id for utterance in utterances],
            rows=rows,
            input_values_BS=torch.from_numpy(padded_BS),
            sample_lengths_B=torch.tensor(lengths),
            frame_lengths_B=torch.tensor(frames),
            time_mask_BT=torch.from_numpy(time_mask_BT),
            masked_frames_BM=torch.from_numpy(masked_frames_BM),
            num_masked_B=torch.tensor(list(map(len, masked))),
            distractors_BMK=torch.from_numpy(distractors_BMK),
            gumbel_seeds=None if epoch is None else self._gumbel_seeds(rows, epoch, copies),
            feature_mask_BH=feature_mask_BH,
        )

    def lengths(self, rows: np.ndarray, num_samples: np.ndarray, epoch: int, copies: np.ndarray) -> np.ndarray:
        """Samples that training utterances of `num_samples` will have, [N]: known before any is read."""
        return num_samples if self.augmenter is None else self.augmenter.lengths(rows, epoch, copies)

    def count_targets(
        self, rows: np.ndarray, lengths: np.ndarray, epoch: int | None, copies: np.ndarray | None = None
    ) -> np.ndarray:
        """Frames to predict of each utterance, [N], from its length in samples (see `lengths`) alone.

        The denominator of an update's loss, known to every rank before any clip is read.
        """
        copies = np.zeros(len(rows), np.int64) if copies is None else copies
        drawn = zip(self._frames(lengths).tolist(), rows, copies, strict=True)
        return np.array([self._draw_masks(count, row, epoch, copy)[0].sum() for count, row, copy in drawn], np.int64)

    def _frames(self, lengths: np.ndarray) -> np.ndarray:
        return num_frames(lengths, self.hf_config.conv_kernel, self.hf_config.conv_stride)

    def _draw_masks(self, frames: int, row: int, epoch: int | None, copy: int) -> tuple[np.ndarray, np.ndarray]:
        """time_mask_T and feature_mask_H; nothing is masked where a frame would have no other to be told apart from."""
        rng = self._generator(row, epoch, copy, ())
        time_mask_T, feature_mask_H = draw_masks(frames, self.hf_config.hidden_size, self.masks, rng)
        return time_mask_T & (time_mask_T.sum() > 1), feature_mask_H

    def _gumbel_seeds(self, rows: np.ndarray, epoch: int, copies: np.ndarray) -> list[int]:
        places = zip(rows, copies, strict=True)
        return [int(self._generator(row, epoch, copy, GUMBEL).integers(2**63)) for row, copy in places]

    def _generator(self, row: int, epoch: int | None, copy: int, stream: tuple[int, ...]) -> np.random.Generator:
        place = EVALUATION if epoch is None else (self.seed, epoch)
        return np.random.default_rng([*place, int(row), int(copy), *stream])


def draw_distractors(num_masked: int, num_negatives: int, rng: np.random.Generator) -> np.ndarray:
    """For each masked frame of an utterance, others of them: positions 0 .. M - 1, int32 [M, K].

    Uniform over the others and with repetition, as transformers' `_sample_negative_indices` draws them.
    """
    if num_masked < 2:
        return np.zeros((num_masked, num_negatives), np.int32)
    drawn = rng.integers(num_masked - 1, size=(num_masked, num_negatives), dtype=np.int32)
    return drawn + (drawn >= np.arange(num_masked, dtype=np.int32)[:, None])
