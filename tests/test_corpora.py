"""Readers: literal tiny corpora in every layout, and what is refused with which remedy."""

import json
import os
from pathlib import Path

import pytest

import corpora
from audio import ClipError
from corpora import AudioLocator, SourceRow, open_corpus, sentence_key
from errors import UsageError

CORPORA = Path(os.environ.get("CTC_CORPORA", Path(__file__).parents[2] / "shared" / "corpora"))
CV_HEADER = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\n"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def rows_of(path: Path, **options: object) -> list[SourceRow]:
    return list(open_corpus(path, **options).read())


def summary(rows: list[SourceRow]) -> list[tuple]:
    return [(row.id, row.split, row.audio_path, row.text, row.speaker) for row in rows]


def cv_line(client: str, name: str, sentence: str) -> str:
    return f"{client}\t{name}\tid\t{sentence}\t2\t\n"


# --- Common Voice


def test_common_voice_release_keeps_quotes_and_columns(tmp_path):
    write(
        tmp_path,
        {
            "train.tsv": CV_HEADER
            + cv_line("c1", "a.mp3", '"Yes, she said')
            + cv_line("c2", "old_name", "  b\u2028c "),
            "dev.tsv": CV_HEADER + cv_line("c3", "d.mp3", 'say ""hi""'),
            "test.tsv": "\ufeff" + CV_HEADER + cv_line("c4", "e.mp3", ""),
            "validated.tsv": CV_HEADER,
            "clips/.keep": "",
        },
    )
    rows = rows_of(tmp_path)
    assert summary(rows) == [
        ("a.mp3", "train", "clips/a.mp3", '"Yes, she said', "c1"),
        ("old_name", "train", "clips/old_name.mp3", "b\u2028c", "c2"),
        ("d.mp3", "dev", "clips/d.mp3", 'say ""hi""', "c3"),
        ("e.mp3", "test", "clips/e.mp3", None, "c4"),
    ]
    assert rows[0].metadata == {"path": "a.mp3", "sentence_id": "id", "up_votes": "2", "age": ""}
    assert open_corpus(tmp_path).kind == "common_voice"


def test_validated_less_sentences_and_speakers_of_dev_and_test(tmp_path):
    validated = [
        cv_line("new", "1.mp3", "A fresh sentence"),
        cv_line("new", "2.mp3", "in DEV!"),
        cv_line("tester", "3.mp3", "another one"),
        cv_line("devver", "4.mp3", "in dev"),
        cv_line("", "5.mp3", "nobody said it"),
    ]
    write(
        tmp_path,
        {
            "validated.tsv": CV_HEADER + "".join(validated),
            "dev.tsv": CV_HEADER + cv_line("devver", "4.mp3", "In dev."),
            "test.tsv": CV_HEADER + cv_line("tester", "9.mp3", "in test") + cv_line("", "8.mp3", "in test too"),
        },
    )
    rows = rows_of(tmp_path, train_split="validated")
    assert [(row.id, row.split, row.problem and row.problem[0]) for row in rows] == [
        ("1.mp3", "train", None),
        ("2.mp3", "train", "held_out_sentence"),
        ("3.mp3", "train", "held_out_speaker"),
        ("4.mp3", "train", "held_out_sentence"),
        ("5.mp3", "train", None),
        ("4.mp3", "dev", None),
        ("9.mp3", "test", None),
        ("8.mp3", "test", None),
    ]
    with pytest.raises(UsageError, match="--train_split validated"):
        rows_of(tmp_path)


@pytest.mark.parametrize("nested", ["cv-valid-train", "cv-valid-train/cv-valid-train"])
def test_first_version_of_common_voice(tmp_path, nested):
    header = "filename,text,up_votes,down_votes,age,gender,accent,duration\n"
    write(
        tmp_path,
        {
            "cv-valid-train.csv": header + 'cv-valid-train/sample-000000.mp3,"learn, he said",1,0,,,,\n',
            "cv-valid-test.csv": header + "cv-valid-test/sample-000000.mp3,end,1,0,twenties,male,us,\n",
            "cv-other-train.csv": header,
            f"{nested}/sample-000000.mp3": b"x",
            "cv-valid-test/sample-000000.mp3": b"x",
        },
    )
    rows = rows_of(tmp_path)
    assert [(row.split, row.text, row.speaker) for row in rows] == [
        ("train", "learn, he said", ""),
        ("test", "end", ""),
    ]
    assert rows[1].metadata["accent"] == "us"
    locator = AudioLocator(tmp_path, None)
    assert all(Path(locator.locate(row)[0].path).is_file() for row in rows)
    # The seed's own split of the training file alone: name the file.
    assert len(rows_of(tmp_path / "cv-valid-train.csv")) == 1


# --- manifests

MANIFESTS = {
    "manifest.csv": 'path,text,speaker,split,topic\na.wav,"one, ""two""",theo,train,x\nb.wav,,nina,Validation,\n',
    "manifest.tsv": 'path\ttext\tspeaker\tsplit\ttopic\na.wav\tone, "two"\ttheo\ttrain\tx\nb.wav\t\tnina\tval\t\n',
    "all.jsonl": '{"audio_filepath": "a.wav", "text": "one, \\"two\\"", "speaker": "theo", "split": "train", '
    '"topic": "x"}\n\n{"audio_filepath": "b.wav", "text": null, "speaker": "nina", "split": "dev"}\n',
}


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_manifests(tmp_path, name, mark, newline, by_folder):
    write(tmp_path, {name: mark + MANIFESTS[name].replace("\n", newline), "notes.txt": "not a manifest"})
    rows = rows_of(tmp_path if by_folder else tmp_path / name)
    assert summary(rows) == [
        ("a.wav", "train", "a.wav", 'one, "two"', "theo"),
        ("b.wav", "dev", "b.wav", None, "nina"),
    ]
    assert rows[0].metadata["topic"] == "x"


def test_manifest_per_split(tmp_path):
    write(tmp_path, {"train.csv": "path,text\na.wav,x\n", "valid.csv": "path,text\nb.wav,y\n"})
    assert [(row.id, row.split) for row in rows_of(tmp_path)] == [("a.wav", "train"), ("b.wav", "dev")]


def test_column_names_can_be_given_and_collisions_are_renamed(tmp_path):
    header = "clip,words,audio,peak,,corpus_audio,SPEAKER_ID\n"
    write(tmp_path, {"m.csv": header + "a.wav,hello,1,2,3,4,5\n"})
    with pytest.raises(UsageError, match="has no column named text"):
        rows_of(tmp_path)
    row = rows_of(tmp_path, audio_column_name="clip", text_column_name="words")[0]
    assert summary([row]) == [("a.wav", None, "a.wav", "hello", "5")]
    renamed = {"clip": "a.wav", "corpus_audio": "1", "corpus_peak": "2", "column_5": "3", "corpus_corpus_audio": "4"}
    assert row.metadata == renamed


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_segments_are_honoured(tmp_path, name):
    records = [("a.wav", 0.5, 1.25), ("a.wav", 2, None), ("a.wav", None, 3.0), ("a.wav", -1, 1), ("a.wav", 0, 0)]
    lines = [json.dumps({"path": path, "offset": o, "duration": d, "text": "x"}) for path, o, d in records]
    if name.endswith("csv"):
        cells = [["" if cell is None else str(cell) for cell in record] for record in records]
        lines = ["path,offset,duration,text", *(",".join([*record, "x"]) for record in cells)]
    write(tmp_path, {name: "\n".join(lines)})
    rows = rows_of(tmp_path)
    assert [(row.id, row.offset_seconds, row.duration_seconds) for row in rows[:3]] == [
        ("a.wav#0.5", 0.5, 1.25),
        ("a.wav#2", 2.0, None),
        ("a.wav", 0.0, 3.0),
    ]
    assert [row.problem and row.problem[0] for row in rows] == [None, None, None, "bad_row", "bad_row"]


def test_malformed_rows_are_marked_and_the_others_stay(tmp_path):
    write(tmp_path, {"m.tsv": "path\ttext\na.wav\tx\nb.wav\nc.wav\ty\tz\nd\0.wav\tx\n"})
    assert [(row.id, row.problem and row.problem[0]) for row in rows_of(tmp_path)] == [
        ("a.wav", None),
        ("m.tsv:3", "bad_row"),
        ("m.tsv:4", "bad_row"),
        ("m.tsv:5", "bad_row"),
    ]
    lines = ['{"path": "a.wav", "text": ""}', "[1]", "{", '{"path": "b.wav", "text": "\\ud800"}', '{"path": "c.wav"}']
    write(tmp_path, {"j/m.jsonl": "\n".join(lines)})
    rows = rows_of(tmp_path / "j")
    assert [(row.text, row.problem and row.problem[0]) for row in rows] == [
        ("", None),  # an explicit empty transcript is one
        (None, "bad_row"),
        (None, "bad_row"),
        (None, "bad_row"),
        (None, None),
    ]


# --- LibriSpeech


def test_librispeech(tmp_path):
    write(
        tmp_path / "LibriSpeech",
        {
            "train-clean-100/19/198/19-198.trans.txt": "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n",
            "train-clean-100/19/198/19-198-0000.flac": b"",
            "dev-clean/84/121/84-121.trans.txt": "84-121-0000 GO\n",
            "test-other/61/70/61-70.trans.txt": "61-70-0000 HE BEGAN\n",
            "test-other/61/70/61-70-0000.wav": b"",
        },
    )
    for folder in (tmp_path, tmp_path / "LibriSpeech"):
        rows = rows_of(folder)
        assert sorted(summary(rows)) == [
            ("19-198-0000", "train", "train-clean-100/19/198/19-198-0000.flac", "NORTHANGER ABBEY", "19"),
            ("19-198-0001", "train", "train-clean-100/19/198/19-198-0001.flac", "THIS LITTLE WORK", "19"),
            ("61-70-0000", "test", "test-other/61/70/61-70-0000.wav", "HE BEGAN", "61"),
            ("84-121-0000", "dev", "dev-clean/84/121/84-121-0000.wav", "GO", "84"),
        ]
    assert rows[0].metadata == {"subset": "dev-clean", "chapter": "121"}
    assert [row.split for row in rows_of(tmp_path / "LibriSpeech" / "dev-clean")] == ["dev"]


# --- refusals


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "absent", "does not exist"),
        ({"x.txt": "a"}, "x.txt", "is not a manifest"),
        ({"x.txt": "a"}, "", "holds no train.tsv"),
        ({"cv-corpus-21.0-yo.tar.gz": b"x"}, "cv-corpus-21.0-yo.tar.gz", r"unpack it with `tar -xf .*yo.tar.gz -C"),
        ({"in/cv.tar.gz": b"x"}, "in", "unpack it with `tar -xf"),
        ({"a.zip": b"x"}, "a.zip", "unpack it with `unzip"),
        ({"a.csv": "path,text\n", "b.csv": "path,text\n"}, "", "holds 2 manifests"),
        ({"yo/train.tsv": CV_HEADER}, "", r"name --corpus .*yo"),
        ({"m.csv": ""}, "", "is empty"),
        ({"m.csv": "path,words\n"}, "", "--text_column_name"),
        ({"m.csv": "sound,text\n"}, "", "--audio_column_name"),
        ({"m.csv": "path,text,text\n"}, "", "two columns named 'text'"),
        ({"m.csv": "path,text,split\na,b,train\nc,d,other\n"}, "", "line 3: the split is 'other'"),
        ({"m.csv": 'path,text\na,"never closed\n'}, "", "not valid CSV"),
        ({"m.csv": "path,text\rlines,of an old Mac\r"}, "", "not valid CSV"),
        ({"m.jsonl": "[]\n"}, "", "jq -c"),
        ({"m.tsv": b"path\ttext\na\tb\nc\tcaf\xe9\n"}, "", r"not UTF-8: byte 0xe9 in line 3.*iconv"),
        ({"m.csv": "path,text\na,b\n".encode("utf-16")}, "", r"not UTF-8.*iconv"),
        ({"train.csv": "path,text\n", "training.csv": "path,text\n"}, "", "both the train split"),
    ],
)
def test_refused_corpora_name_the_remedy(tmp_path, files, name, message):
    write(tmp_path, files)
    with pytest.raises(UsageError, match=message) as error:
        rows_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_ignored_settings_are_said(tmp_path):
    write(tmp_path, {"m.csv": "path,text\n"})
    assert "--train_split validated is ignored" in " ".join(open_corpus(tmp_path, train_split="validated").notes)


# --- where audio may lie


def row(path: str) -> SourceRow:
    return SourceRow(path, None, path, "x", "", {})


@pytest.fixture
def places(tmp_path: Path) -> Path:
    write(tmp_path, {"corpus/clips/a.wav": "a", "other/b.wav": "b", "other/clips/c.wav": "c"})
    (tmp_path / "corpus/inside.wav").symlink_to("clips/a.wav")
    (tmp_path / "corpus/outside.wav").symlink_to(tmp_path / "other/b.wav")
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "other")
    (tmp_path / "corpus/dangling.wav").symlink_to("nowhere.wav")
    os.mkfifo(tmp_path / "corpus/pipe.wav")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "alone", "with_root"),
    [
        ("clips/a.wav", "found", "found"),
        ("clips/../clips/a.wav", "found", "found"),
        ("{}/corpus/clips/a.wav", "found", "found"),
        ("inside.wav", "found", "found"),
        ("outside.wav", "outside_corpus", "found"),
        ("linked/b.wav", "outside_corpus", "found"),
        ("../other/b.wav", "outside_corpus", "found"),
        ("{}/other/b.wav", "outside_corpus", "found"),
        ("b.wav", "missing", "found"),
        ("clips/c.wav", "missing", "found"),
        ("/etc/passwd", "outside_corpus", "outside_corpus"),
        ("../../../../../../../../../../etc/passwd", "outside_corpus", "outside_corpus"),
        ("dangling.wav", "missing", "missing"),
        ("pipe.wav", "undecodable", "undecodable"),
        ("clips", "undecodable", "undecodable"),
        ("..", "outside_corpus", "outside_corpus"),
        ("", "missing", "missing"),
    ],
)
def test_audio_stays_in_the_corpus_and_audio_root(places, path, alone, with_root):
    for root, expected in ((None, alone), (str(places / "other"), with_root)):
        try:
            AudioLocator(places / "corpus", root).locate(row(path.format(places)))
            found = "found"
        except ClipError as error:
            found = error.reason
        assert found == expected


def test_corpus_folder_may_itself_be_a_link(places):
    (places / "link").symlink_to("corpus")
    assert AudioLocator(places / "link", None).locate(row("clips/a.wav"))[0].source_bytes == 1


def test_missing_audio_root_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        AudioLocator(tmp_path, str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello, world!", "hello world", True),
        ("Ọjọ́", "O\u0323jo\u0323\u0301", True),
        ("ọjọ", "ojo", False),
        ("ƙasa", "kasa", False),
        ("well-known", "well known", True),
        ("room 1", "room 2", False),
    ],
)
def test_sentence_key(one, other, same):
    assert (sentence_key(one) == sentence_key(other)) == same


# --- real corpora


def test_real_yoruba_release():
    if not (CORPORA / "yo").is_dir():
        pytest.skip(f"no real corpus at {CORPORA / 'yo'}")
    rows = rows_of(CORPORA / "yo")
    counts = {split: sum(row.split == split for row in rows) for split in corpora.SPLITS}
    assert counts == {"train": 280, "dev": 70, "test": 100}
    assert rows[0].text == "itumo eyi nipe ki a to bẹrẹ si ra ounjẹ latokere a nri ounjẹ ilẹ wa jẹ"
    locator = AudioLocator(CORPORA / "yo", None)
    assert all(locator.locate(row)[0].source_bytes > 0 for row in rows)


def test_real_digits_manifest():
    if not (CORPORA / "digits").is_dir():
        pytest.skip(f"no real corpus at {CORPORA / 'digits'}")
    rows = rows_of(CORPORA / "digits")
    assert len(rows) == 2000
    assert {row.speaker for row in rows} >= {"theo", "jackson"}
    assert {row.split for row in rows} == {None}


# ---------------------------------------------------------------------------------------------------------------------
# Speech without text


def open_untranscribed(path: Path) -> corpora.Corpus:
    return corpora.open_corpus(path, needs_text=False)


def test_folder_of_audio_files(tmp_path):
    files = dict.fromkeys(("ann/b.WAV", "ann/2020/a.mp3", "ben/c.flac", "d.opus"), b"x")
    folder = write(tmp_path / "radio", files | {"ann/notes.txt": "x", ".DS_Store": "x"})
    (folder / "ben" / "linked").symlink_to(folder / "ann")
    corpus = open_untranscribed(folder)
    found = list(corpus.read())
    assert [(row.id, row.speaker) for row in found] == [
        ("d.opus", ""), ("ann/b.WAV", "ann"), ("ann/2020/a.mp3", "ann"), ("ben/c.flac", "ben"),
    ]  # fmt: skip
    assert all(row.id == row.audio_path and row.split is None and row.text is None for row in found)
    assert corpus.kind == "audio" and corpus.count_lines() == 4
    assert corpus.notes == (
        "3 files without the suffix of an audio format, or links to folders, are left out",
        "speakers: the 2 folders of radio that hold audio",
    )
    assert list(corpus.files()) == [folder, folder / "ann", folder / "ann/2020", folder / "ben"]
    before = corpus.state()
    (folder / "ben" / "new.wav").write_bytes(b"x")
    assert corpus.state() != before


def test_one_folder_of_audio_is_no_speaker(tmp_path):
    folder = write(tmp_path, {"clips/a.wav": b"x", "clips/b.wav": b"x"})
    assert [(row.id, row.speaker) for row in open_untranscribed(folder).read()] == [
        ("clips/a.wav", ""), ("clips/b.wav", ""),
    ]  # fmt: skip


def test_a_name_that_is_not_utf_8_is_a_bad_row(tmp_path):
    write(tmp_path, {"a.wav": b"x"})
    (tmp_path / os.fsdecode(b"b\xff.wav")).write_bytes(b"x")
    good, bad = open_untranscribed(tmp_path).read()
    assert good.problem is None
    assert (bad.id, bad.problem[0]) == ("b\\udcff.wav", "bad_row")


def test_tables_need_no_text_column_where_none_is_wanted(tmp_path):
    folder = write(tmp_path, {"a.csv": "path,room\nx.wav,hall\n", "b.csv": "path,sentence\nx.wav,hello\n"})
    with pytest.raises(UsageError, match="has no column named text"):
        corpora.open_corpus(folder / "a.csv")
    (row,) = open_untranscribed(folder / "a.csv").read()
    assert (row.audio_path, row.text, row.metadata) == ("x.wav", None, {"path": "x.wav", "room": "hall"})
    (row,) = open_untranscribed(folder / "b.csv").read()
    assert "sentence" not in row.metadata


def test_a_folder_with_several_tables_is_one_of_audio_files(tmp_path):
    folder = write(tmp_path, {"a.csv": "x\n1\n", "b.csv": "x\n1\n", "c.wav": b"x"})
    with pytest.raises(UsageError, match="holds 2 manifests"):
        corpora.open_corpus(folder)
    assert [row.id for row in open_untranscribed(folder).read()] == ["c.wav"]


def test_folders_without_audio_are_refused_with_the_remedy(tmp_path):
    folder = write(tmp_path, {"sub/a.wav": b"x"})
    with pytest.raises(UsageError, match="for speech without text, give --untranscribed"):
        corpora.open_corpus(folder)
    with pytest.raises(UsageError, match="neither a manifest nor an audio file"):
        open_untranscribed(write(tmp_path / "empty", {"a.txt": "x"}))
