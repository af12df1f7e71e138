"""languages.py and languages.yaml: how languages write, as data; and the text rules made of it."""

import json
from pathlib import Path

import pytest
from conftest import write_part

from cache import FactCache
from config import TrainConfig, parse_arguments
from data import ShardDataset
from errors import UsageError
from languages import LANGUAGES_FILE, Language, _read, find_language
from text import TextNormalizer, Vocabulary, build_tokenizer, describe_rules, read_rules, write_rules
from transcripts import measure_texts

IGNORED = ',?.!-;:"'
CODES = list(_read(LANGUAGES_FILE).languages)


@pytest.mark.parametrize(
    ("code", "case", "text", "expected"),
    [
        ("ha", "lower", "‘Yan makaranta, ’ya’ya; SA’A", "ƴan makaranta ƴaƴa sa'a"),
        ("ha", "upper", "'yan Ƙofa", "ƳAN ƘOFA"),
        ("ha", "keep", "'Yan 'yan", "Ƴan ƴan"),
        ("uk", "lower", "М’ята і 'лапки' п`ять", "мʼята і лапки пʼять"),
        ("haw", "lower", "‘O Hawai'i", "ʻo hawaiʻi"),
        ("br", "lower", "C’hoant, c‘hoar 'm eus", "c'hoant c'hoar 'm eus"),
        ("en", "upper", "Don’t “stop”", "DON'T STOP"),
        ("fr", "lower", "L’homme a dit 'oui'", "l'homme a dit oui"),
        ("yo", "lower", "B'ó “ṣe” bẹ́ẹ̀", "bó ṣe bẹ́ẹ̀"),
        ("tr", "lower", "IŞIK İstanbul'da I\u0307zmir", "ışık istanbulda izmir"),
        ("tr", "upper", "ısı iyi istanbul", "ISI İYİ İSTANBUL"),
        ("tr", "keep", "ısı İyi", "ısı İyi"),
        ("az", "lower", "Iğdır İlqar", "ığdır ilqar"),
        ("ro", "lower", "Ştiinţa", "știința"),
        ("uz", "lower", "O'zbek G‘oya ma’no", "oʻzbek gʻoya maʼno"),
    ],
)
def test_texts_by_the_rules_of_a_language(code: str, case: str, text: str, expected: str) -> None:
    assert TextNormalizer(IGNORED, case, language=find_language(code))(text) == expected


def test_without_a_language_nothing_has_changed() -> None:
    normalise = TextNormalizer(IGNORED, "lower")
    assert normalise("‘Yan SA’A “a” IŞIK İ Hawaiʻi") == "'yan sa'a “a” işik i̇ hawaiʻi"


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("case", ["lower", "upper", "keep"])
def test_twice_changes_nothing_and_many_are_as_one(code: str, case: str) -> None:
    language = find_language(code)
    spellings = [spelling for pair in language.replace for spelling in pair]
    texts = [
        "‘Yan ’twas İI ıi ß O'zbek G‘oya ''quoted'' o' 'o Ştiinţa ọjọ́",
        " ".join([*spellings, *map(str.upper, spellings), *map(str.title, spellings), *language.digraphs]),
        "", " ' ", "c'h ʼʻ",
    ]  # fmt: skip
    normalise = TextNormalizer(IGNORED, case, language=language)
    once = [normalise(text) for text in texts]
    assert [normalise(text) for text in once] == once
    assert normalise.normalize_many(texts) == once
    letters = frozenset("".join(once)) - {" "}
    for_vocabulary = TextNormalizer(IGNORED, case, letters, language)  # As after the vocabulary is built.
    assert [for_vocabulary(text) for text in texts] == once


def test_an_apostrophe_is_written_as_the_vocabulary_has_it() -> None:
    typed = Vocabulary({token: index for index, token in enumerate(["<pad>", "<unk>", "|", "'", "м", "я"])})
    assert TextNormalizer.for_vocabulary(typed, IGNORED, "auto", find_language("uk"))("мʼя м’я") == "м'я м'я"


def test_characters_of_the_run_go_whatever_the_language_says() -> None:
    assert TextNormalizer(IGNORED + "'", "lower", language=find_language("en"))("don’t") == "dont"


def test_case_of_a_language_needs_a_tokenizer_that_leaves_it_alone() -> None:
    vocabulary = Vocabulary({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3}, lowercases=True)
    with pytest.raises(UsageError, match="--language tr: this checkpoint's tokenizer changes case"):
        TextNormalizer.for_vocabulary(vocabulary, "", "auto", find_language("tr"))


def test_every_digraph_is_written_by_its_language() -> None:
    """One with an apostrophe that the language does not keep would never be found."""
    for code in CODES:
        language = find_language(code)
        normalise = TextNormalizer(IGNORED, "lower", language=language)
        assert [normalise(f"a{digraph}a")[1:-1] for digraph in language.digraphs] == list(language.digraphs), code
        assert len(set(language.digraphs)) == len(language.digraphs), code


# The file


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "languages.yaml"
    path.write_text(text, encoding="utf-8")
    return _read(path)


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ("{nam: Hausa}", "xx: unknown key nam, nearest is name"),
        ("{apostrophe: x}", "xx: apostrophe cannot be 'x': it must be empty or one of '"),
        ("{apostrophe_at_edges: maybe}", "xx: apostrophe_at_edges cannot be 'maybe': it must be true or false"),
        ("{digraphs: [sh, s]}", r"xx: digraphs cannot be \['sh', 's'\]: a list of texts of several characters"),
        ("{digraphs: sh}", "xx: digraphs cannot be 'sh'"),
        ("{lower: [I]}", r"xx: lower cannot be \['I'\]: a mapping of single letters"),
        ("{lower: {II: i}}", "xx: lower cannot be .*: a mapping of single letters"),
        ("{replace: {a: [b]}}", "xx: replace cannot be .*: a mapping of texts to texts"),
        (
            "{name: A, ignore: [a], digraphs: {a: b}}",
            "xx: digraphs cannot be .*; ignore cannot be .*: a text is needed",
        ),
        ("[a]", "xx must be a mapping"),
        ("{name: A, name: B}", "name is given 2 times"),
    ],
)
def test_a_damaged_file_is_refused_by_key(tmp_path: Path, rules: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read(tmp_path, f"languages: {{xx: {rules}}}\nnearest_letters: {{}}\n")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("languages: {}", "must hold the keys languages and nearest_letters"),
        ("languages: []\nnearest_letters: {}", "languages must be a mapping"),
        ("languages: {}\nnearest_letters: {ab: c}", "nearest_letters must give letters for one letter, found 'ab'"),
        ("languages: {", "cannot be read as YAML"),
        ("- a", "must hold the keys"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read(tmp_path, text)


def test_words_are_words(tmp_path: Path) -> None:
    """YAML takes the code of Norwegian and a French vowel for truth values."""
    found = read(tmp_path, "languages:\n  no: {name: Norwegian, digraphs: [on, off]}\nnearest_letters: {}\n")
    assert found.languages["no"].digraphs == ("on", "off")


def test_an_unknown_language_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"--language xx: languages.yaml has az \(Azerbaijani\), .*, ha \(Hausa\), "):
        parse_arguments(
            TrainConfig,
            ["--data_dir", "d", "--output_dir", "o", "--model_name_or_path", "m", "--language", "xx"],
            "",
        )


# What a model folder keeps


def test_rules_of_training_are_read_back_whatever_the_file_says_later(tmp_path: Path) -> None:
    changed = Language("ha", "Hausa of then", "'", digraphs=("sh",), replace=(("sh", "ʃ"),))
    write_rules(tmp_path, TextNormalizer("-", "lower", language=changed))
    rules = read_rules(tmp_path)
    assert rules == {"characters_to_ignore": "-", "case": "lower", "language": changed}
    assert read_rules(tmp_path, "ha")["language"] == changed
    assert read_rules(tmp_path, "en", case="upper") == rules | {"case": "upper", "language": find_language("en")}
    assert json.loads(json.dumps(describe_rules(rules)))["language"] == "ha"
    # A resume compares those of now with those that a checkpoint kept.
    assert json.loads(json.dumps(changed.facts())) == changed.facts()


def test_rules_of_a_model_without_a_language(tmp_path: Path) -> None:
    (tmp_path / "text_rules.json").write_text('{"characters_to_ignore": "-", "case": "upper"}')  # As they were before.
    assert read_rules(tmp_path) == {"characters_to_ignore": "-", "case": "upper", "language": None}
    assert describe_rules(read_rules(tmp_path)) == {"characters_to_ignore": "-", "case": "upper"}
    (tmp_path / "text_rules.json").write_text(
        '{"characters_to_ignore": "-", "case": "upper", "languages": [{"code": "ha", "digraphs": 3}]}'
    )
    with pytest.raises(UsageError, match="is damaged"):
        read_rules(tmp_path)


def test_facts_of_texts_are_kept_apart_by_language(tmp_path: Path) -> None:
    import numpy as np

    write_part(tmp_path / "train" / "part_1", [("a", np.zeros(1600, np.int16), "b'ó", "s")])
    dataset, cache = ShardDataset(tmp_path / "train"), FactCache(tmp_path)
    labels = Vocabulary({token: index for index, token in enumerate(["<pad>", "<unk>", "|", "b", "ó", "'"])})
    counts = [
        measure_texts(dataset, TextNormalizer("", "lower", language=language), labels, cache).num_labels.tolist()
        for language in (None, find_language("yo"), find_language("en"))
    ]
    assert counts == [[3], [2], [3]]


# Why digraphs are units of the table of letters, and no outputs of the model


def test_transformers_loses_spaces_around_tokens_of_several_characters() -> None:
    """Were "sh" an output, its tokenizer would read "mai shi" as one word, and pipeline's word ends would shift."""
    tokens = ["<pad>", "<unk>", "|", *"aims", "h", "sh"]
    tokenizer = build_tokenizer({token: index for index, token in enumerate(tokens)})
    assert tokenizer.decode(tokenizer("mai shi").input_ids) == "maishi"
    plain = build_tokenizer({token: index for index, token in enumerate(tokens[:-1])})
    assert plain.decode(plain("mai shi").input_ids) == "mai shi"
