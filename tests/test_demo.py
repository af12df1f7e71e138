"""The demo corpus: what is unseen where, the same samples every time, and what is refused."""

import wave

import pytest

from corpora import SPLITS, open_corpus
from demo import DemoCorpus, _plan_demo, make_demo_corpus
from errors import RunFailed, UsageError

SMALL_DEMO = DemoCorpus(
    num_train_clips=24, num_dev_clips=4, num_test_strings=4, train_voices=("en-us", "en-us+f2"), unseen_voice="en-029"
)


def test_demo_strings_and_voices_are_unseen_where_promised():
    demo = DemoCorpus()
    speeches = _plan_demo(demo)
    texts = {split: {s.text for s in speeches if s.split == split} for split in SPLITS}
    voices = {split: {s.voice for s in speeches if s.split == split} for split in SPLITS}
    counts = {split: sum(s.split == split for s in speeches) for split in SPLITS}
    assert counts == {"train": 1200, "dev": 80, "test": 160}
    assert not texts["train"] & (texts["dev"] | texts["test"]) and not texts["dev"] & texts["test"]
    assert voices["train"] == voices["dev"] == set(demo.train_voices)
    assert voices["test"] == {*demo.train_voices, demo.unseen_voice} and demo.unseen_voice not in voices["train"]
    assert {len(text.split()) for text in texts["train"]} == {1, 2, 3, 4}


def test_demo_corpus_is_the_same_every_time(tmp_path):
    pytest.importorskip("espeakng_loader")
    for name in ("one", "two"):
        make_demo_corpus(tmp_path / name, SMALL_DEMO)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("one", "two"))
    assert first == second
    assert not list(tmp_path.glob(".*"))
    rows = list(open_corpus(tmp_path / "one").read())
    assert len(rows) == 24 + 4 + 2 * 4
    assert {row.speaker for row in rows if row.split == "train"} == {"en-us", "en-us+f2"}
    with wave.open(str(tmp_path / "one" / rows[0].audio_path)) as file:
        assert file.getframerate() == 22_050 and file.getnframes() > 5_000
    make_demo_corpus(tmp_path / "one", SMALL_DEMO)
    with pytest.raises(UsageError, match="holds another corpus"):
        make_demo_corpus(tmp_path / "one", DemoCorpus())


def test_unknown_voice_is_not_spoken_by_another(tmp_path):
    pytest.importorskip("espeakng_loader")
    bad = DemoCorpus(2, 1, 1, train_voices=("en-us", "en-nowhere"), unseen_voice="en-029")
    with pytest.raises(RunFailed, match="'en-nowhere' failed with status 2"):
        make_demo_corpus(tmp_path / "demo", bad)
    assert not list(tmp_path.iterdir())


def test_demo_without_the_extra_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[demo\]'"):
        make_demo_corpus(tmp_path / "demo")
    assert not list(tmp_path.iterdir())
