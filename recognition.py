"""A model at work on recordings: windows of many files in batches of like length, one transcript for each file.

S: samples, T: frames, V: vocabulary.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from audio import SAMPLE_RATE_HZ, ClipError
from config import TranscribeConfig
from data import Batch, Collator, Utterance
from decoding import BeamDecoder
from memory import MemoryLimit
from pretrained import load_recogniser
from reading import BeamReading, GreedyReading, Reading
from recording import Recording
from recovery import Cuts
from subtitles import Transcript
from text import TextNormalizer
from windows import FrameGrid, Joiner, Window, plan_windows

Advance = Callable[[float], None]


@dataclass
class _Job:
    """A recording on its way: what its windows have settled so far."""

    recording: Recording
    windows: list[Window]
    joiner: Joiner
    text: Reading


class Recogniser:
    """A fine-tuned model that turns recordings into transcripts, greedily or with a language model; fp32.

    Raises:
        UsageError: no such model, or one whose head has not been trained.
    """

    def __init__(self, config: TranscribeConfig) -> None:
        self.config = config
        loaded = load_recogniser(config.model_name_or_path, config.target_lang)
        self.vocabulary = loaded.vocabulary
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded.model.to(self.device).eval()
        hf_config = self.model.hf.config
        self.grid = FrameGrid.of(hf_config.conv_stride)
        self._collate = Collator(
            TextNormalizer.for_vocabulary(self.vocabulary, "", "keep"),
            self.vocabulary,
            loaded.processor.feature_extractor.do_normalize,
            hf_config,
            seed=0,
        )
        weights = {name: getattr(config, name) for name in ("lm_weight", "word_score", "beam_size")}
        self._decoder = None if config.lm is None else BeamDecoder.open(config.lm, self.vocabulary, **weights)
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
        jobs = [
            None
            if isinstance(one, ClipError)
            else _Job(one, self._plan(one), Joiner(self.vocabulary.blank_id, self.grid), self._new_text())
            for _, one in opened
        ]
        with contextlib.ExitStack() as stack:
            for job in jobs:
                if job is not None:
                    stack.enter_context(job.recording)
            self._pass_all([job for job in jobs if job is not None], advance)
            for (name, one), job in zip(opened, jobs, strict=True):
                yield name, one if job is None else (self._transcript(job), job.recording.shortfall_seconds)

    def _new_text(self) -> Reading:
        if self._decoder is None:
            return GreedyReading(self.vocabulary, self.grid.seconds)
        return BeamReading(self.vocabulary, self.grid.seconds, self._decoder)

    def _plan(self, recording: Recording) -> list[Window]:
        chunk, stride = self.config.chunk_length_s, self.config.stride_length_s
        return plan_windows(recording.num_samples, self.grid, chunk, 2 * stride)

    def _pass_all(self, jobs: list[_Job], advance: Advance) -> None:
        """Every window through the model, the longest first; those of one recording are of one length, in order."""
        waiting = [(window, job) for job in jobs for window in job.windows]
        waiting.sort(key=lambda pair: pair[0].start - pair[0].stop)
        for batch in _cut(waiting, self.config.per_device_eval_batch_size, self.config.max_batch_seconds):
            audio = [job.recording.read(window.start, window.stop) for window, job in batch]
            for (window, job), log_probs_TV in zip(batch, self.log_probs(audio), strict=True):
                job.text.add(job.joiner.add(window, log_probs_TV))
                # Overlaps are heard twice and counted once.
                advance(job.recording.seconds / len(job.windows))

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

    def _transcript(self, job: _Job) -> Transcript:
        job.text.add(job.joiner.rest())
        text, words = job.text.finish()
        joiner = "" if self.vocabulary.delimiter_id is None else " "
        return Transcript(job.recording.name, job.recording.seconds, text, words, joiner)


def _cut(waiting: list[tuple[Window, _Job]], max_rows: int, max_seconds: float) -> Iterator[list[tuple[Window, _Job]]]:
    """Batches of successive windows, the first of which is the longest of its batch; one alone may exceed the limit."""
    start = 0
    while start < len(waiting):
        longest = waiting[start][0].stop - waiting[start][0].start
        rows = min(max_rows, int(max_seconds * SAMPLE_RATE_HZ // max(longest, 1)))
        yield waiting[start : start + max(rows, 1)]
        start += max(rows, 1)
