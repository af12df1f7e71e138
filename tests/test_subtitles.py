"""Every format against what it must look like, written out."""

import itertools
import json
import re

import pytest

from subtitles import FORMATS, MAX_CUE_CHARACTERS, MAX_CUE_SECONDS, Transcript, make_cues
from timing import Character, Word


def words_of(*spoken: tuple[str, float, float]) -> list[Word]:
    """(text, start, end) with confidence 0.9."""
    return [Word(text, start, end, 0.9, (Character(text, start, end, 0.9),)) for text, start, end in spoken]


SHORT = Transcript(
    "folder/a b.wav",
    3662.5,
    "so <b> & c",
    words_of(("so", 0.5, 0.7), ("<b>", 0.8, 1.25), ("&", 3661.5, 3661.6), ("c", 3661.7, 3662.0)),
)
QUOTED = Transcript("q.wav", 1.0, "don't \">", words_of(("don't", 0.0, 0.4), ('">', 0.5, 1.0)))
NOTHING = Transcript("n.wav", 2.0, "", [])


@pytest.mark.parametrize(
    ("kind", "transcript", "expected"),
    [
        ("txt", SHORT, "so <b> & c\n"),
        ("txt", NOTHING, "\n"),
        ("srt", SHORT, "1\n00:00:00,500 --> 00:00:01,500\nso <b>\n\n2\n01:01:01,500 --> 01:01:02,500\n& c\n\n"),
        ("srt", NOTHING, ""),
        (
            "vtt", SHORT,
            "WEBVTT\n\n00:00:00.500 --> 00:00:01.500\nso &lt;b&gt;\n\n01:01:01.500 --> 01:01:02.500\n&amp; c\n\n",
        ),
        ("vtt", NOTHING, "WEBVTT\n\n"),
        ("vtt", QUOTED, "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\ndon't \"&gt;\n\n"),
        (
            "ctm", SHORT,
            "a_b 1 0.50 0.20 so 0.900\na_b 1 0.80 0.45 <b> 0.900\n"
            "a_b 1 3661.50 0.10 & 0.900\na_b 1 3661.70 0.30 c 0.900\n",
        ),
        ("ctm", NOTHING, ""),
        ("json", NOTHING, '{"file": "n.wav", "seconds": 2.0, "text": "", "words": []}\n'),
    ],
)  # fmt: skip
def test_formats(kind: str, transcript: Transcript, expected: str) -> None:
    assert FORMATS[kind](transcript) == expected


def test_json_has_every_character_in_one_line() -> None:
    text = FORMATS["json"](SHORT)
    assert text.count("\n") == 1
    found = json.loads(text)
    assert (found["file"], found["seconds"], found["text"]) == (SHORT.file, SHORT.seconds, SHORT.text)
    character = {"text": "so", "start": 0.5, "end": 0.7, "confidence": 0.9}
    assert found["words"][0] == character | {"characters": [character]}


def test_cues_can_be_read() -> None:
    """An hour without a pause: every word once, in cues that fit and do not overlap."""
    words = words_of(*((f"word{number}", 0.35 * number, 0.35 * number + 0.3) for number in range(10_000)))
    transcript = Transcript("long.wav", 3600.0, " ".join(word.text for word in words), words)
    cues = make_cues(transcript)
    assert " ".join(cue.text.replace("\n", " ") for cue in cues) == transcript.text
    for cue in cues:
        assert len(cue.text) <= MAX_CUE_CHARACTERS
        assert max(map(len, cue.text.split("\n"))) <= 50
        assert 0 < cue.end - cue.start <= MAX_CUE_SECONDS
    assert all(one.end <= following.start for one, following in itertools.pairwise(cues))


def test_a_cue_stays_a_second_unless_the_next_one_begins() -> None:
    words = words_of(("a", 1.0, 1.1), ("b", 2.5, 2.6), ("c", 3.9, 4.0))
    assert [(cue.start, cue.end) for cue in make_cues(Transcript("x", 4.2, "a b c", words))] == [
        (1.0, 2.0), (2.5, 3.5), (3.9, 4.2),
    ]  # fmt: skip


def test_without_spaces_characters_are_joined() -> None:
    words = words_of(*((one, 0.2 * number, 0.2 * number + 0.1) for number, one in enumerate("你好吗")))
    assert [cue.text for cue in make_cues(Transcript("x", 1.0, "你好吗", words, joiner=""))] == ["你好吗"]


def test_clock_carries_over() -> None:
    text = FORMATS["srt"](Transcript("x", 3600.0, "a", words_of(("a", 59.9996, 60.0), ("b", 3599.9999, 3600.0))))
    assert re.findall(r"\d\d:\d\d:\d\d,\d{3}", text)[0::2] == ["00:01:00,000", "01:00:00,000"]
