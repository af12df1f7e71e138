"""A transcript as a file: plain text, JSON, subtitles (SRT, WebVTT) or CTM."""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from timing import Word

# Two lines of subtitles on a screen (BBC Subtitle Guidelines: about 37 characters a line; Netflix: 42).
MAX_CUE_CHARACTERS = 84
MAX_LINE_CHARACTERS = 42
MAX_CUE_SECONDS = 6.0
# A pause this long ends a cue.
PAUSE_SECONDS = 1.0
# Shorter cues cannot be read; they stay until the next one at most.
MIN_CUE_SECONDS = 1.0


@dataclass(frozen=True)
class Transcript:
    """What was said in one recording.

    Attributes:
        file: as the user named it.
        seconds: its length.
        text: what the model writes.
        words: of the text, with their times.
        joiner: stands between two words: a space, or nothing where the vocabulary has no word delimiter.
    """

    file: str
    seconds: float
    text: str
    words: Sequence[Word]
    joiner: str = " "


@dataclass(frozen=True)
class Cue:
    """Words that are on the screen together, from `start` to `end` (seconds)."""

    start: float
    end: float
    text: str


def to_txt(transcript: Transcript) -> str:
    """The text in one line."""
    return f"{transcript.text}\n"


def to_json(transcript: Transcript) -> str:
    """File, length, text and words with their characters, times in seconds, in one line."""
    facts = {"file": transcript.file, "seconds": round(transcript.seconds, 3), "text": transcript.text}
    words = [_rounded(asdict(word)) for word in transcript.words]
    return json.dumps(facts | {"words": words}, ensure_ascii=False) + "\n"


def to_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues, comma before the milliseconds."""
    cues = enumerate(make_cues(transcript), start=1)
    return "".join(f"{number}\n{_span(cue, ',')}\n{cue.text}\n\n" for number, cue in cues)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1/), in which <, > and & are escaped."""
    cues = (f"{_span(cue, '.')}\n{html.escape(cue.text, quote=False)}\n\n" for cue in make_cues(transcript))
    return "WEBVTT\n\n" + "".join(cues)


def to_ctm(transcript: Transcript) -> str:
    """NIST's time marked conversation: file, channel, start, duration, word, confidence; a line per word."""
    # A field ends at a white space.
    name = "_".join(Path(transcript.file).stem.split()) or "_"
    return "".join(
        f"{name} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.3f}\n"
        for word in transcript.words
    )


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": to_txt,
    "json": to_json,
    "srt": to_srt,
    "vtt": to_vtt,
    "ctm": to_ctm,
}


def make_cues(transcript: Transcript) -> list[Cue]:
    """Cut the words into cues at pauses, at MAX_CUE_SECONDS and at MAX_CUE_CHARACTERS; no two overlap."""
    groups = list(_group(transcript.words, len(transcript.joiner)))
    cues = []
    for number, group in enumerate(groups):
        latest = groups[number + 1][0].start if number + 1 < len(groups) else transcript.seconds
        end = min(max(group[-1].end, group[0].start + MIN_CUE_SECONDS), max(latest, group[-1].end))
        cues.append(Cue(group[0].start, end, _in_lines([word.text for word in group], transcript.joiner)))
    return cues


def _group(words: Sequence[Word], gap: int) -> Iterator[list[Word]]:
    group: list[Word] = []
    length = 0
    for word in words:
        if group and (
            word.start - group[-1].end > PAUSE_SECONDS
            or word.end - group[0].start > MAX_CUE_SECONDS
            or length + gap + len(word.text) > MAX_CUE_CHARACTERS
        ):
            yield group
            group, length = [], 0
        group.append(word)
        length += (gap if length else 0) + len(word.text)
    if group:
        yield group


def _in_lines(words: list[str], joiner: str) -> str:
    """One line, or two of about the same length."""
    whole = joiner.join(words)
    if len(whole) <= MAX_LINE_CHARACTERS or len(words) < 2:
        return whole
    breaks = ((joiner.join(words[:place]), joiner.join(words[place:])) for place in range(1, len(words)))
    return "\n".join(min(breaks, key=lambda lines: max(map(len, lines))))


def _span(cue: Cue, separator: str) -> str:
    return f"{_clock(cue.start, separator)} --> {_clock(cue.end, separator)}"


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{separator}{milliseconds % 1000:03d}"


def _rounded(value: object) -> object:
    """Milliseconds and three digits of a probability are all there is to know."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
