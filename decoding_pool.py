"""Processes that decode: a beam search keeps a core busy for some hundredths of the time that the audio lasts.

Processes and not threads: the search holds Python's lock, and two threads decode hardly more than one.

T: frames, V: outputs of the recogniser's head.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from audio import end_with_parent_process, fork_server, usable_cores, without_interrupts, without_main_module
from decoding import BeamDecoder, BeamSettings, Decoded
from errors import RunFailed
from language_model import LanguageModel
from text import Vocabulary

Item = TypeVar("Item")
# Utterances under way for each process; their log-probabilities are in memory.
UNDER_WAY = 4


def choose_num_workers(beam_workers: int, local_processes: int = 1) -> int:
    """Decoding processes of one rank: those asked for, or for -1 its share of the cores that this program may use."""
    if beam_workers != -1:
        return beam_workers
    return max(usable_cores() // local_processes, 1)


@dataclass(frozen=True)
class Finished(Generic[Item]):
    """An utterance that was decoded, and the seconds of one core that it took."""

    item: Item
    decoded: Decoded
    seconds: float


@dataclass
class _Bench:
    """Where one process decodes; its decoder is made again when the settings change."""

    vocabulary: Vocabulary
    model: LanguageModel | None
    decoder: BeamDecoder | None = None

    def decode(self, settings: BeamSettings, log_probs_TV: np.ndarray) -> tuple[Decoded, float]:
        """The text, and the seconds of this core that the search took."""
        if self.decoder is None or self.decoder.settings != settings:
            self.decoder = BeamDecoder(self.vocabulary, self.model, settings)
        before = time.process_time()
        (decoded,) = self.decoder([log_probs_TV])
        return decoded, time.process_time() - before


class DecodingPool(Generic[Item]):
    """Processes that decode, few utterances under way at a time; a context manager.

    With `num_workers` 0 all is done here.

    Attributes:
        settings: of the search; may be changed when nothing is under way.
    """

    def __init__(
        self, vocabulary: Vocabulary, model: LanguageModel | None, settings: BeamSettings, num_workers: int
    ) -> None:
        self.settings = settings
        decoder = BeamDecoder(vocabulary, model, settings)  # What is wrong is said here, not by a process.
        self._bench, self._num_workers = _Bench(vocabulary, model, None if num_workers else decoder), num_workers
        self._under_way: deque[tuple[Item, Future[tuple[Decoded, float]]]] = deque()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "DecodingPool[Item]":
        if self._num_workers:
            self._stack.enter_context(without_main_module())
            with without_interrupts():
                self._executor = ProcessPoolExecutor(
                    self._num_workers,
                    mp_context=fork_server("torchaudio.models.decoder", __name__),
                    initializer=_initialize_worker,
                    initargs=(self._bench,),
                )
                for _ in range(self._num_workers):
                    self._executor.submit(int)
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_workers:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def submit(self, item: Item, log_probs_TV: np.ndarray) -> Iterator[Finished[Item]]:
        """Hand in one utterance; yields those that are done, in their order.

        Raises:
            RunFailed: a process died.
        """
        if not self._num_workers:
            yield Finished(item, *self._bench.decode(self.settings, log_probs_TV))
            return
        with _naming_death():
            self._under_way.append((item, self._executor.submit(_decode_in_worker, self.settings, log_probs_TV)))
            while self._under_way and (
                self._under_way[0][1].done() or len(self._under_way) > UNDER_WAY * self._num_workers
            ):
                yield self._take()

    def decode(self, utterances: Iterable[tuple[Item, np.ndarray]]) -> Iterator[Finished[Item]]:
        """All of them, in their order.

        Raises:
            RunFailed: a process died.
        """
        for item, log_probs_TV in utterances:
            yield from self.submit(item, log_probs_TV)
        yield from self.finish()

    def finish(self) -> Iterator[Finished[Item]]:
        """Wait for all that are left.

        Raises:
            RunFailed: a process died.
        """
        with _naming_death():
            while self._under_way:
                yield self._take()

    def _take(self) -> Finished[Item]:
        item, future = self._under_way.popleft()
        return Finished(item, *future.result())


@contextlib.contextmanager
def _naming_death() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise RunFailed("a process of the beam search died: too little memory? take fewer (--beam_workers)") from error


_worker_bench: _Bench


def _initialize_worker(bench: _Bench) -> None:
    global _worker_bench
    end_with_parent_process()
    torch.set_num_threads(1)
    _worker_bench = bench


def _decode_in_worker(settings: BeamSettings, log_probs_TV: np.ndarray) -> tuple[Decoded, float]:
    return _worker_bench.decode(settings, log_probs_TV)
