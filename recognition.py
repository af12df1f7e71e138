"""A model at work on recordings: windows of many files in batches of like length, one transcript for each file.

S: samples, T: frames, V: vocabulary.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from audio import SAMPLE_RATE_HZ, ClipError
from config import TrainConfig, TranscribeConfig
from data import Batch, Collator, Utterance
from errors import UsageError
from memory import MemoryLimit, limit_bytes
from metrics import greedy_decode
from pretrained import load_model
from recording import Recording
from recovery import Cuts
from subtitles import Transcript
from text import TextNormalizer
from timing import LabelPath, find_words
from windows import FrameGrid, Joiner, Window, plan_windows

Advance = Callable[[int], None]


@dataclass
class _Reading:
    """A recording on its way: what its windows have settled so far."""

    recording: Recording
    windows: list[Window]
    joiner: Joiner
    paths: list[LabelPath] = field(default_factory=list)


class Recogniser:
    """A fine-tuned model that turns recordings into transcripts, greedily; fp32.

    Raises:
        UsageError: no such model, or one whose head has not been trained.
    """

    def __init__(self, config: TranscribeConfig) -> None:
        self.config = config
        name = config.model_name_or_path
        loaded = load_model(TrainConfig(model_name_or_path=name, vocabulary="model"), lambda: [])
        if not loaded.head_fits:
            raise UsageError(f"{name} has no head for its vocabulary, it cannot write yet: fine-tune it with train.py")
        self.vocabulary = loaded.vocabulary
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded.model.to(self.device).eval()
        hf_config = self.model.hf.config
        self.grid = FrameGrid.of(hf_config.conv_kernel, hf_config.conv_stride)
        self._collate = Collator(
            TextNormalizer.for_vocabulary(self.vocabulary, "", "keep"),
            self.vocabulary,
            loaded.processor.feature_extractor.do_normalize,
            hf_config,
            seed=0,
        )
        limit_bytes(self.device, config.memory_limit_mb)  # makes a GPU's allocator keep it
        self._memory_limit = MemoryLimit(self.device, config.memory_limit_mb)
        self._cuts = Cuts("transcription", "lower --chunk_length_s", lambda line: print(line, file=sys.stderr))

    def read(
        self, opened: Sequence[tuple[str, Recording | ClipError]], advance: Advance
    ) -> Iterator[tuple[str, tuple[Transcript, float] | ClipError]]:
        """Transcripts in the order of `opened`, each with the seconds that its file lacks; recordings are closed.

        Args:
            opened: names, with what opening them gave.
            advance: told the seconds of audio that are done.
        """
        readings = [
            None if isinstance(one, ClipError) else _Reading(one, self._plan(one), Joiner(self._blank_id, self.grid))
            for _, one in opened
        ]
        with contextlib.ExitStack() as stack:
            for reading in readings:
                if reading is not None:
                    stack.enter_context(reading.recording)
            self._pass_all([reading for reading in readings if reading is not None], advance)
            for (name, one), reading in zip(opened, readings, strict=True):
                yield name, one if reading is None else (self._transcript(reading), reading.recording.shortfall_seconds)

    @property
    def _blank_id(self) -> int:
        return self.vocabulary.blank_id

    def _plan(self, recording: Recording) -> list[Window]:
        chunk, stride = self.config.chunk_length_s, self.config.stride_length_s
        return plan_windows(recording.num_samples, self.grid, chunk, 2 * stride)

    def _pass_all(self, readings: list[_Reading], advance: Advance) -> None:
        """Every window through the model, the longest first; those of one recording are of one length, in order."""
        waiting = [(window, reading) for reading in readings for window in reading.windows]
        waiting.sort(key=lambda pair: pair[0].start - pair[0].stop)
        for batch in _cut(waiting, self.config.per_device_eval_batch_size, self.config.max_batch_seconds):
            audio = [reading.recording.read(window.start, window.stop) for window, reading in batch]
            for (window, reading), log_probs_TV in zip(batch, self.log_probs(audio), strict=True):
                reading.paths.append(LabelPath.greedy(reading.joiner.add(window, log_probs_TV)))
                # Overlaps are heard twice and counted once.
                advance(round(reading.recording.seconds / len(reading.windows)))

    @torch.inference_mode()
    def log_probs(self, audio: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of each stretch of int16 samples, fp32 [T, V], its own frames only."""
        utterances = [Utterance(str(number), samples_S, "") for number, samples_S in enumerate(audio)]
        batch = self._collate(utterances, np.arange(len(audio)))
        while (results := self._cuts.attempt(lambda: self._forward_pieces(batch))) is None:
            pass
        return results

    def _forward_pieces(self, batch: Batch) -> list[np.ndarray]:
        found = []
        # Convolutions in fp32, not in TF32, torch's default on GPUs.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for piece in self._cuts.divide([batch]):
                with self._memory_limit.watch():
                    logits_BTV, frame_lengths_B = self.model(
                        piece.input_values_BS.to(self.device), piece.sample_lengths_B
                    )
                    log_probs_BTV = logits_BTV.float().log_softmax(-1).cpu().numpy()
                found += [row[:length] for row, length in zip(log_probs_BTV, frame_lengths_B.tolist(), strict=True)]
        return found

    def _transcript(self, reading: _Reading) -> Transcript:
        path = LabelPath.join([*reading.paths, LabelPath.greedy(reading.joiner.rest())])
        (text,) = greedy_decode(torch.from_numpy(path.ids_T)[None], torch.tensor([len(path.ids_T)]), self.vocabulary)
        words = find_words(path, self.vocabulary, self.grid.seconds)
        joiner = "" if self.vocabulary.delimiter_id is None else " "
        return Transcript(reading.recording.name, reading.recording.seconds, text, words, joiner)


def _cut(
    waiting: list[tuple[Window, _Reading]], max_rows: int, max_seconds: float
) -> Iterator[list[tuple[Window, _Reading]]]:
    """Batches of successive windows, the first of which is the longest of its batch; one alone may exceed the limit."""
    start = 0
    while start < len(waiting):
        longest = waiting[start][0].stop - waiting[start][0].start
        rows = min(max_rows, int(max_seconds * SAMPLE_RATE_HZ // max(longest, 1)))
        yield waiting[start : start + max(rows, 1)]
        start += max(rows, 1)
