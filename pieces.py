"""Speech without text for pre-training: the rows of any corpus with their texts taken off, long recordings in pieces.

A piece is planned from the file's length alone, as its n-th part; it then begins and ends at the quietest place near
these bounds, which whoever decodes it finds (audio.py), so that no recording is read as a whole or twice.
"""

import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import replace

import soundfile

from audio import ClipError
from corpora import AudioLocator, Corpus, SourceRow

# Of the longest piece: how far a bound may move, each way.
REACH_SHARE = 1 / 8
# Bounds are multiples of it, which are whole samples at every usual rate: both pieces at a bound search alike.
GRID_SECONDS = 0.04


def without_text(corpus: Corpus, locator: AudioLocator, longest_seconds: float) -> Corpus:
    """The same corpus with empty texts, and with pieces of at most `longest_seconds` for what is longer.

    Args:
        corpus: as `open_corpus` gives it.
        locator: finds its files, whose lengths are read in the first pass.
        longest_seconds: of a piece.
    """
    cut = _Cut(corpus, locator, longest_seconds)
    note = f"recordings of over {longest_seconds:g} s become pieces, cut where it is quiet; texts are not kept"
    return replace(corpus, read=cut.read, notes=(*corpus.notes, note))


class _Cut:
    """Rows in pieces; keeps the length of each source row, since every header takes as long as many rows."""

    def __init__(self, corpus: Corpus, locator: AudioLocator, longest_seconds: float) -> None:
        self._corpus, self._locator, self._longest_seconds = corpus, locator, longest_seconds
        self._seconds = array("d")

    def read(self) -> Iterator[SourceRow]:
        for number, row in enumerate(self._corpus.read()):
            if number == len(self._seconds):
                self._seconds.append(self._length(row))
            yield from cut_row(replace(row, text=""), self._seconds[number], self._longest_seconds)

    def _length(self, row: SourceRow) -> float:
        """Seconds; NaN where they cannot be known, which decoding then says in its own words."""
        if row.problem is not None:
            return math.nan
        if row.duration_seconds is not None:
            return row.duration_seconds
        try:
            path = self._locator.locate(row)[0].path
            info = soundfile.info(os.fsencode(path))
        except (ClipError, soundfile.SoundFileError, OSError, TypeError):
            return math.nan
        return info.frames / info.samplerate - row.offset_seconds


def cut_row(row: SourceRow, seconds: float, longest_seconds: float) -> Iterator[SourceRow]:
    """The row itself, or its pieces as ID#0001, ID#0002, ...: as few as the limit allows, of like lengths.

    Args:
        row: a recording or a segment of one.
        seconds: its length; NaN for unknown.
        longest_seconds: of a piece.
    """
    if not longest_seconds < seconds < math.inf:
        yield row
        return
    reach = math.floor(longest_seconds * REACH_SHARE / GRID_SECONDS) * GRID_SECONDS
    # A step of the grid less, by which rounding may lengthen a piece.
    count = math.ceil(seconds / (longest_seconds - 2 * reach - GRID_SECONDS))
    bounds = [round(number * seconds / count / GRID_SECONDS) * GRID_SECONDS for number in range(count)]
    for number, start in enumerate(bounds):
        is_last = number == count - 1
        end = row.duration_seconds if is_last else bounds[number + 1]
        yield replace(
            row,
            id=f"{row.id}#{number + 1:04d}",
            offset_seconds=row.offset_seconds + start,
            duration_seconds=None if end is None else end - start,
            start_reach_seconds=reach if number else 0.0,
            end_reach_seconds=0.0 if is_last else reach,
        )
