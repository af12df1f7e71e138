"""Normalisation by literal tables, vocabulary and encoding against transformers' tokenizer."""

import json
import pickle
import random
import unicodedata

import numpy as np
import pytest
from transformers import AutoTokenizer, Wav2Vec2CTCTokenizer

from errors import UsageError
from text import (
    LARGE_960H_VOCABULARY,
    TextNormalizer,
    Vocabulary,
    build_tokenizer,
    build_vocabulary,
    measure_coverage,
    required_frames,
    required_frames_many,
    resolve_case,
)

IGNORED = ',?.!-;:"'
YORUBA = "Ọjọ́ tí a máa ń ṣe àjọyọ̀"


@pytest.mark.parametrize(
    ("case", "text", "expected"),
    [
        ("upper", "It’s a “test”, isn`t it?", "IT'S A “TEST” ISN'T IT"),
        ("upper", "  a\t\u00a0b\u2009c\r\nd\u3000 ", "A B C D"),
        ("lower", 'Well-known; no: "yes"!', "wellknown no yes"),
        ("keep", "Mixed Case.", "Mixed Case"),
        ("lower", "Ƙasa, Ɓera, Ɗan ʼYan Ƴaƴa", "ƙasa ɓera ɗan 'yan ƴaƴa"),
        ("upper", "ƙ ɓ ɗ ƴ", "Ƙ Ɓ Ɗ Ƴ"),
        ("upper", YORUBA, "ỌJỌ́ TÍ A MÁA Ń ṢE ÀJỌYỌ̀"),
        ("keep", unicodedata.normalize("NFD", YORUBA), unicodedata.normalize("NFC", YORUBA)),
        ("keep", "e\u0323\u0301 o\u0323\u0300", "\u1eb9\u0301 \u1ecd\u0300"),
        ("lower", "\u202ba\u200bb\u200d\u2069\ufeff so\u00adft \x00nul", "ab soft nul"),
        ("upper", "straße ǰ", "STRASSE J\u030c"),
        ("keep", "a\u034f\u0301", "\u00e1"),
        ("keep", "?!,", ""),
        ("keep", "", ""),
    ],
)
def test_normalizer_literal_table(case: str, text: str, expected: str) -> None:
    normalizer = TextNormalizer(IGNORED, case)
    assert normalizer(text) == expected
    assert normalizer.normalize_many([text, "12"]) == [expected, "12"]


@pytest.mark.parametrize(
    ("ignored", "case", "letters", "text", "expected"),
    [
        ("'", "keep", "", "it’s it's", "its its"),
        ("\u2019", "keep", "", "‘it’s", "'its"),
        ("q", "upper", "", "quQ", "U"),
        ("\u0301", "keep", "", "ọ́ á à", "ọ a à"),
        ("]^-\\", "keep", "", "a]b^c-d\\e", "abcde"),
        ("", "keep", "\u02bc\u200c", "cʼhoar mi\u200cx it’s", "cʼhoar mi\u200cx it's"),
        ("\u02bc", "keep", "\u02bc", "cʼhoar", "choar"),
    ],
)
def test_ignored_characters_and_letters(ignored: str, case: str, letters: str, text: str, expected: str) -> None:
    assert TextNormalizer(ignored, case, frozenset(letters))(text) == expected


@pytest.mark.parametrize("case", ["upper", "lower", "keep"])
def test_normalizing_twice_changes_nothing(case: str) -> None:
    generator = random.Random(0)
    pool = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    nearby = [chr(code) for code in [*range(0x600), *range(0x1E00, 0x2100)]]
    for ignored in (IGNORED, "\u0301ʼ", "'q"):
        normalizer = TextNormalizer(ignored, case)
        for index in range(4000):
            once = normalizer("".join(generator.choices(pool if index % 2 else nearby, k=8)))
            assert normalizer(once) == once
            assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    ("case", "tokens", "expected"),
    [
        ("auto", LARGE_960H_VOCABULARY, "upper"),
        ("auto", {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "ọ": 4, "'": 5}, "lower"),
        ("auto", {"a": 0, "B": 1}, "keep"),
        ("auto", {"ا": 0, "<PAD>": 1}, "keep"),
        ("lower", LARGE_960H_VOCABULARY, "lower"),
    ],
)
def test_resolve_case(case: str, tokens: dict[str, int], expected: str) -> None:
    assert resolve_case(case, tokens) == expected


def test_large_960h_vocabulary() -> None:
    assert len(LARGE_960H_VOCABULARY) == 32
    expected = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "A": 7, "L": 15, "K": 26, "'": 27, "Z": 31}
    assert {token: LARGE_960H_VOCABULARY[token] for token in expected} == expected


def test_built_vocabulary() -> None:
    texts = iter(["ba ab|", "ọ\u0301 a", "ƙ"])
    assert build_vocabulary(texts) == {
        "<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "ƙ": 5, "\u0301": 6, "ọ": 7,
    }  # fmt: skip
    assert build_vocabulary(["aab", "c"], minimum_count=2) == {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}
    with pytest.raises(UsageError, match="text column"):
        build_vocabulary(["", " | "])


@pytest.mark.parametrize("source", [None, YORUBA])
def test_encode_equals_the_tokenizer(source: str | None) -> None:
    tokens = LARGE_960H_VOCABULARY if source is None else build_vocabulary([source])
    tokenizer = build_tokenizer(tokens)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    generator = random.Random(0)
    pool = [*(token for token in tokens if len(token) == 1 and token != "|"), " ", " ", "q", "𝄞", "ß"]
    for _ in range(300):
        text = " ".join("".join(generator.choices(pool, k=12)).split())
        labels_L = vocabulary.encode(text)
        assert labels_L.dtype == np.int32
        assert labels_L.tolist() == tokenizer(text).input_ids
        assert vocabulary.decode_labels(labels_L) == tokenizer.decode(labels_L, group_tokens=False)
    assert vocabulary.encode("").tolist() == []


def test_texts_cannot_name_tokens() -> None:
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY)
    assert vocabulary.encode("A|B").tolist() == [7, 3, 24]
    assert 0 not in vocabulary.encode("<pad>")
    underscore = Vocabulary({"_": 0, "?": 1, "|": 2, "a": 3}, pad_token="_", unknown_token="?")
    assert underscore.encode("a_ a").tolist() == [3, 1, 2, 3]


def test_round_trip_of_tone_marks_and_hooked_letters() -> None:
    for text in (YORUBA, "ƙasa ɓera ɗan 'yan ƴaƴa"):
        normalized = TextNormalizer(IGNORED, "lower")(text)
        vocabulary = Vocabulary(build_vocabulary([normalized]))
        assert vocabulary.decode_labels(vocabulary.encode(normalized)) == normalized
        assert vocabulary.unknown_id not in vocabulary.encode(normalized)


def test_lower_casing_tokenizer() -> None:
    tokenizer = build_tokenizer(LARGE_960H_VOCABULARY)
    tokenizer.do_lower_case = True
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    normalizer = TextNormalizer.for_vocabulary(vocabulary, IGNORED, "auto")
    assert normalizer("It’s SO.") == "it's so"
    assert vocabulary.encode("it's so").tolist() == tokenizer("it's so").input_ids
    assert vocabulary.decode_labels(vocabulary.encode("it's so")) == "it's so"
    assert measure_coverage(["it's so"], vocabulary).unknown_fraction == 0
    with pytest.raises(UsageError, match="--case upper"):
        TextNormalizer.for_vocabulary(vocabulary, "", "upper")


def test_normalizer_for_a_vocabulary_keeps_its_letters() -> None:
    vocabulary = Vocabulary(build_vocabulary(["cʼhoar"]))
    normalizer = TextNormalizer.for_vocabulary(vocabulary, IGNORED, "auto")
    assert normalizer("Cʼhoar.") == "cʼhoar"
    assert pickle.loads(pickle.dumps(normalizer))("Cʼhoar.") == "cʼhoar"


def test_nested_vocabulary_takes_the_language_that_is_set(tmp_path) -> None:
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}
    path = tmp_path / "vocab.json"
    nested = {"eng": {**special, "a": 5, "b": 6}, "yor": {**special, "ọ": 5, "a": 6, "ṣ": 7}}
    path.write_text(json.dumps(nested), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(path), target_lang="eng")
    assert Vocabulary.from_tokenizer(tokenizer).encode("ab ọ").tolist() == [5, 6, 4, 3]
    tokenizer.set_target_lang("yor")
    vocabulary = pickle.loads(pickle.dumps(Vocabulary.from_tokenizer(tokenizer)))
    assert vocabulary.encode("aṣ ọb").tolist() == [6, 7, 4, 5, 3]
    assert len(vocabulary) == 8


def test_coverage_names_what_is_missing() -> None:
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY)
    coverage = measure_coverage(["AB CD", "Aé Zéß", "| x"], vocabulary)
    assert coverage.characters == 11
    assert coverage.unknown == {"é": 2, "ß": 1, "|": 1, "x": 1}
    assert coverage.examples == {"é": "Aé Zéß", "ß": "Aé Zéß", "|": "| x", "x": "| x"}
    assert coverage.unknown_fraction == 5 / 11
    assert measure_coverage(["lower case"], vocabulary).unknown_fraction == 1.0
    assert measure_coverage([], vocabulary).unknown_fraction == 0.0


@pytest.mark.parametrize(
    ("labels", "frames"), [([], 0), ([5], 1), ([5, 6, 5], 3), ([5, 5], 3), ([5] * 8, 15), ([5, 5, 6, 6], 6)]
)
def test_required_frames(labels: list[int], frames: int) -> None:
    assert required_frames(np.array(labels, dtype=np.int32)) == frames


@pytest.mark.parametrize(
    "tokens", [LARGE_960H_VOCABULARY, build_vocabulary([YORUBA]), {"a": 0, "|": 1, "[UNK]": 2, "[PAD]": 3}]
)
def test_tokenizer_has_no_token_of_its_own(tokens: dict[str, int], tmp_path) -> None:
    tokenizer = build_tokenizer(tokens)
    assert tokenizer.get_vocab() == tokens
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(loaded), loaded.get_vocab()) == (len(tokens), tokens)
    assert Vocabulary.from_tokenizer(loaded) == Vocabulary.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<pad>": 0, "<unk>": 1, "|": 2, "a": 4}, "0 .. 3"),
        ({"<pad>": 0, "|": 1, "a": 2}, "<unk>"),
        ({"<unk>": 0, "|": 1, "a": 2}, "<pad>"),
        ({"<pad>": 0, "<unk>": 1, "a": 2}, "between words"),
    ],
)
def test_bad_vocabularies_are_refused(tokens: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_tokenizer(tokens)
    if "|" in tokens and 4 not in tokens.values():
        with pytest.raises(UsageError, match=message):
            Vocabulary(tokens)


TEXTS = ["", "aa b", "aab", "b", "", "", "bb bb", "é|x", "b b", ""]


@pytest.mark.parametrize("texts", [TEXTS, [], [""], ["", ""], ["a"], ["aa"], TEXTS[::-1], [t for t in TEXTS if t]])
@pytest.mark.parametrize("settings", [{}, {"lowercases": True}])
def test_many_texts_are_encoded_as_one_by_one(texts: list[str], settings: dict[str, bool]) -> None:
    vocabulary = Vocabulary({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "A": 5, "B": 6}, **settings)
    labels, counts = vocabulary.encode_many(texts)
    one_by_one = [vocabulary.encode(text) for text in texts]
    assert labels.tolist() == [label for row in one_by_one for label in row.tolist()]
    assert counts.tolist() == [len(row) for row in one_by_one]
    assert required_frames_many(labels, counts).tolist() == [required_frames(row) for row in one_by_one]


def test_many_random_texts_need_the_frames_of_one_by_one() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, 500)
    labels = rng.integers(3, 5, counts.sum())
    rows = np.split(labels, np.cumsum(counts)[:-1])
    assert required_frames_many(labels, counts).tolist() == [required_frames(row) for row in rows]


BLOCK_CHARACTERS = "aAeÉßΣσİıẹ\u0301\u0323\u1100\u1161\u0345ʼ’ \t\r\u2028,.!-\u200d"


@pytest.mark.parametrize("case", ["upper", "lower", "keep"])
@pytest.mark.parametrize("ignored", [IGNORED, "\u0301,", "\n", ""])
def test_many_texts_become_what_each_becomes(case: str, ignored: str) -> None:
    generator = random.Random(1)
    texts = ["".join(generator.choices(BLOCK_CHARACTERS, k=generator.randrange(9))) for _ in range(2_000)]
    normalizer = TextNormalizer(ignored, case)
    expected = [normalizer(text) for text in texts]
    assert normalizer.normalize_many(texts) == expected
    assert normalizer.normalize_many([*texts, "two\nlines"]) == [*expected, normalizer("two\nlines")]
    assert normalizer.normalize_many([]) == []
