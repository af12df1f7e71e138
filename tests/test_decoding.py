"""Beam search: greedy with beam 1, equal to adding up every path, and never a special token."""

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from arpa import read_arpa

import ngram
from decoding import BeamDecoder, BeamSettings, choose_settings
from decoding_pool import DecodingPool
from errors import RunFailed, UsageError
from integrity import hash_file
from language_model import LanguageModel, open_language_model
from lm_building import spell
from metrics import greedy_decode
from text import LARGE_960H_VOCABULARY, Vocabulary

needs_flashlight = pytest.mark.usefixtures("flashlight")
ABC = Vocabulary({"<pad>": 0, "|": 1, "<unk>": 2, "a": 3, "b": 4})
LARGE = Vocabulary(dict(LARGE_960H_VOCABULARY))
NO_MODEL = BeamSettings(lm_weight=0.0, beam_size=1)
# More hypotheses than a test can have: the search is exact.
EXACT = 5_000


@pytest.fixture(scope="module")
def flashlight() -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="the extra lm is not installed (flashlight-text)")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., LanguageModel]:
    """A language model of some sentences, in a folder as build-lm writes it."""

    def make(sentences: Sequence[str], unit: str = "word", order: int = 3, words: Sequence[str] = ()) -> LanguageModel:
        tokenised = [sentence if unit == "word" else spell(sentence) for sentence in sentences]
        (tmp_path / "lm.arpa").write_text("".join(ngram.estimate(tokenised, order).arpa_lines()), encoding="utf-8")
        occurring = " ".join(sentences).split()
        listed = "".join(f"{word}\t{occurring.count(word)}\n" for word in sorted({*occurring, *words}))
        (tmp_path / "words.tsv").write_text(listed, encoding="utf-8")
        facts = {"unit": unit, "order": order, "file": "lm.arpa", "sha256": hash_file(tmp_path / "lm.arpa")}
        (tmp_path / "lm.json").write_text(json.dumps(facts))
        return open_language_model(tmp_path)

    return make


def random_log_probs(generator: np.random.Generator, frames: int, outputs: int, spread: float = 3.0) -> np.ndarray:
    logits_TV = torch.from_numpy(generator.normal(0, spread, (frames, outputs)).astype(np.float32))
    return logits_TV.log_softmax(-1).numpy()


def greedy(log_probs_TV: np.ndarray, vocabulary: Vocabulary) -> str:
    return greedy_decode(torch.from_numpy(log_probs_TV)[None], torch.tensor([len(log_probs_TV)]), vocabulary)[0]


@needs_flashlight
@pytest.mark.parametrize("vocabulary", [ABC, LARGE], ids=["five", "large-960h"])
def test_beam_1_without_a_model_is_greedy(vocabulary: Vocabulary) -> None:
    generator = np.random.default_rng(0)
    special = [vocabulary.token_ids[token] for token in ("<s>", "</s>", "<unk>") if token in vocabulary.token_ids]
    decoder, texts = BeamDecoder(vocabulary, None, NO_MODEL), set()
    for frames in [*range(1, 40), 200]:
        log_probs_TV = random_log_probs(generator, frames, len(vocabulary))
        log_probs_TV[:, special] = -50
        log_probs_TV[:, [vocabulary.blank_id, vocabulary.delimiter_id]] += 3
        (found,) = decoder([log_probs_TV])
        assert found.text == greedy(log_probs_TV, vocabulary)
        texts.add(found.text)
    assert len(texts) > 30
    assert any("  " in text for text in texts), "a delimiter, a blank and a delimiter are two spaces, as in greedy"


@needs_flashlight
@pytest.mark.parametrize("unit", [None, "word", "character"])
def test_special_tokens_are_never_written(unit: str | None, make_model: Callable[..., LanguageModel]) -> None:
    model = None if unit is None else make_model(["AB A", "B AB", "A A B"], unit)
    generator = np.random.default_rng(1)
    log_probs_TV = random_log_probs(generator, 30, len(LARGE))
    log_probs_TV[:, 1:4] += 20  # <s> </s> <unk>
    assert "<s>" in greedy(log_probs_TV, LARGE)
    (found,) = BeamDecoder(LARGE, model, BeamSettings(1.0, 0.0, 20))([log_probs_TV])
    assert found.text and "<" not in found.text
    assert not {1, 2, 3} & set(found.labels.tolist())


@needs_flashlight
def test_labels_begin_at_their_frames(make_model: Callable[..., LanguageModel]) -> None:
    path = [0, 3, 3, 0, 3, 1, 1, 4, 0, 0, 4, 4]
    log_probs_TV = np.full((len(path), len(ABC)), -20.0, np.float32)
    log_probs_TV[np.arange(len(path)), path] = 0.0
    for model in (None, make_model(["aa bb", "bb aa"]), make_model(["aa bb", "bb aa"], "character")):
        (found,) = BeamDecoder(ABC, model, BeamSettings(0.1, 0.0, 50))([log_probs_TV])
        assert found.text == "aa bb"
        assert found.labels.tolist()[:5] == [3, 3, 1, 4, 4]
        assert found.frames.tolist()[:5] == [1, 4, 5, 7, 10]


def collapse(path: Sequence[int]) -> tuple[int, ...]:
    """Labels of a path; the search begins, and a delimiter at the first frame does not begin a word."""
    merged = [label for label, _ in itertools.groupby([ABC.delimiter_id, *path])]
    return tuple(label for label in merged[1:] if label != ABC.blank_id)


def log_add(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def best_by_exhaustion(
    log_probs_TV: np.ndarray, score: Callable[[tuple[int, ...]], tuple[float, object] | None], frame_score: float = 0.0
) -> object:
    """The text with the largest sum over every path, each with what a model adds to it.

    `score` gives labels what is added (nats) and the text that they stand for; None where they may not be written.
    """
    frames = len(log_probs_TV)
    paths: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for path in itertools.product([0, 1, 3, 4], repeat=frames):
        value = float(log_probs_TV[np.arange(frames), path].sum()) + frame_score * path.count(ABC.delimiter_id)
        paths[collapse(path)].append(value)
    texts: dict[object, list[float]] = defaultdict(list)
    for labels, values in paths.items():
        own = score(labels)
        if own is not None:
            texts[own[1]].append(log_add(values) + own[0])
    return max(texts, key=lambda text: log_add(texts[text]))


@needs_flashlight
def test_without_a_model_the_text_is_the_most_probable_of_all() -> None:
    generator = np.random.default_rng(2)
    decoder, differs = BeamDecoder(ABC, None, BeamSettings(0.0, 0.0, EXACT)), 0
    for _ in range(20):
        log_probs_TV = random_log_probs(generator, 5, len(ABC), spread=1.0)
        expected = best_by_exhaustion(log_probs_TV, lambda labels: (0.0, labels))
        (found,) = decoder([log_probs_TV])
        assert found.text == ABC.decode_labels(expected)
        differs += found.text != greedy(log_probs_TV, ABC)
    assert differs > 2, "greedy would have done"


@needs_flashlight
@pytest.mark.parametrize("space_score", [0.0, 1.5])
def test_with_a_character_model_as_every_path_added_up(
    space_score: float, make_model: Callable[..., LanguageModel]
) -> None:
    model = make_model(["ab ba", "b ab", "aab b ab", "ba"], "character")
    arpa, weight = read_arpa(model.path.read_text()), 1.3
    names = {1: "<space>", 3: "a", 4: "b"}

    def score(labels: tuple[int, ...]) -> tuple[float, object]:
        return weight * arpa.score([names[label] for label in labels]), labels

    generator = np.random.default_rng(3)
    decoder = BeamDecoder(ABC, model, BeamSettings(weight, space_score, EXACT))
    plain, differs = BeamDecoder(ABC, None, BeamSettings(0.0, 0.0, EXACT)), 0
    for _ in range(20):
        log_probs_TV = random_log_probs(generator, 5, len(ABC), spread=1.0)
        (found,) = decoder([log_probs_TV])
        assert found.text == ABC.decode_labels(best_by_exhaustion(log_probs_TV, score, space_score))
        differs += found.text != plain([log_probs_TV])[0].text
    assert differs > 2, "the language model changed nothing"


@needs_flashlight
@pytest.mark.parametrize("word_score", [-1.0, 2.0])
def test_with_a_word_model_as_every_path_added_up(word_score: float, make_model: Callable[..., LanguageModel]) -> None:
    # "bb" is in the list and was never seen: an unknown word to the n-grams.
    model = make_model(["ab a", "a a", "b ab", "ab a"], words=["bb"])
    arpa, weight = read_arpa(model.path.read_text()), 0.5

    def score(labels: tuple[int, ...]) -> tuple[float, object] | None:
        words = ABC.decode_labels(labels).split()
        if not {"a", "b", "ab", "bb"}.issuperset(words):
            return None
        return weight * arpa.score(words) + word_score * len(words), " ".join(words)

    generator = np.random.default_rng(4)
    decoder, texts = BeamDecoder(ABC, model, BeamSettings(weight, word_score, EXACT)), set()
    for _ in range(20):
        log_probs_TV = random_log_probs(generator, 5, len(ABC), spread=1.0)
        (found,) = decoder([log_probs_TV])
        assert found.text == best_by_exhaustion(log_probs_TV, score)
        texts.add(found.text)
    assert len(texts) > 4


@needs_flashlight
@pytest.mark.parametrize(
    ("path", "heard"),
    [([0, 3, 4, 0, 4, 3, 0], "abba"), ([3, 4, 1, 4, 0, 0, 0], "ab b"), ([3, 4, 1, 1, 0, 3, 0], "ab a")],
    ids=["space missing", "last letter lost", "first letter lost"],
)
def test_what_was_run_together_or_lost_comes_back(
    path: list[int], heard: str, make_model: Callable[..., LanguageModel]
) -> None:
    log_probs_TV = np.log(np.full((len(path), len(ABC)), 0.02, np.float32))
    log_probs_TV[np.arange(len(path)), path] = math.log(0.9)
    assert greedy(log_probs_TV, ABC) == heard
    (found,) = BeamDecoder(ABC, make_model(["ab ba", "ab ba"]), BeamSettings(2.0, 0.0, 50))([log_probs_TV])
    assert found.text == "ab ba"


@needs_flashlight
@pytest.mark.parametrize("unit", [None, "word", "character"])
def test_no_frames_are_no_text(unit: str | None, make_model: Callable[..., LanguageModel]) -> None:
    model = None if unit is None else make_model(["ab a", "b"], unit)
    (found,) = BeamDecoder(ABC, model, BeamSettings())([np.zeros((0, len(ABC)), np.float32)])
    assert (found.text, len(found.labels), len(found.frames)) == ("", 0, 0)


@needs_flashlight
@pytest.mark.parametrize("unit", ["word", "character"])
def test_a_tokenizer_that_writes_lower_case(unit: str, make_model: Callable[..., LanguageModel]) -> None:
    vocabulary = Vocabulary({"<pad>": 0, "|": 1, "<unk>": 2, "A": 3, "B": 4}, lowercases=True)
    model = make_model(["ab ba", "ba ab"], unit)
    path = [3, 4, 1, 4, 3, 0]
    log_probs_TV = np.log(np.full((len(path), 5), 0.02, np.float32))
    log_probs_TV[np.arange(len(path)), path] = math.log(0.9)
    assert BeamDecoder(vocabulary, model, BeamSettings())([log_probs_TV])[0].text == "ab ba"


@needs_flashlight
def test_outputs_beyond_the_vocabulary_and_without_a_word_delimiter(make_model: Callable[..., LanguageModel]) -> None:
    vocabulary = Vocabulary({"<pad>": 0, "<unk>": 1, "a": 2, "b": 3})
    log_probs_TV = np.log(np.full((4, 6), 0.02, np.float32))
    log_probs_TV[np.arange(4), [2, 5, 3, 4]] = math.log(0.9)
    for model in (None, make_model(["ab", "ba"], "character")):
        assert BeamDecoder(vocabulary, model, BeamSettings())([log_probs_TV])[0].text == "ab"
    with pytest.raises(UsageError, match="use --unit character"):
        BeamDecoder(vocabulary, make_model(["ab", "ba"]), BeamSettings())


@needs_flashlight
@pytest.mark.parametrize("unit", ["word", "character"])
def test_words_in_another_case_are_refused(unit: str, make_model: Callable[..., LanguageModel]) -> None:
    with pytest.raises(UsageError, match=r"can spell 0% .* build-lm --model_name_or_path"):
        BeamDecoder(LARGE, make_model(["lower case words"], unit), BeamSettings())


@needs_flashlight
def test_ngrams_that_kenlm_cannot_open_are_named(make_model: Callable[..., LanguageModel]) -> None:
    model = make_model(["ab ba"])
    model.path.write_text("no ARPA file\n")
    with pytest.raises(UsageError, match=r"lm.arpa cannot be opened by flashlight-text \(.*build it again"):
        BeamDecoder(ABC, model, BeamSettings())


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[lm\]'"):
        BeamDecoder(ABC, None, NO_MODEL)


def test_weights_are_the_given_then_the_tuned_then_the_usual(make_model: Callable[..., LanguageModel]) -> None:
    model = make_model(["ab a", "b"])
    assert choose_settings(model) == BeamSettings()
    tuned = {"lm_weight": 2.5, "word_score": -1.0, "beam_size": 20}
    (model.folder / "tuning.json").write_text(json.dumps(tuned))
    assert choose_settings(model) == BeamSettings(2.5, -1.0, 20)
    assert choose_settings(model, word_score=0.0, beam_size=7) == BeamSettings(2.5, 0.0, 7)
    (model.folder / "tuning.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tuning.json is damaged .*: run decoding.py tune again"):
        choose_settings(model)


@needs_flashlight
def test_processes_decode_the_same_in_order_and_few_at_a_time(make_model: Callable[..., LanguageModel]) -> None:
    model, settings = make_model(["ab a", "b ab"], "character"), BeamSettings(0.5, 0.0, 20)
    generator = np.random.default_rng(5)
    utterances = [random_log_probs(generator, frames, len(ABC)) for frames in generator.integers(0, 60, 40)]
    handed_in = []

    def handing_in() -> object:
        for item in enumerate(utterances):
            handed_in.append(item[0])
            yield item

    with DecodingPool(ABC, model, settings, num_workers=2) as pool:
        found = []
        for finished in pool.decode(handing_in()):
            found.append(finished)
            assert len(handed_in) - len(found) <= 8
        pool.settings = BeamSettings(3.0, 1.0, 5)
        changed = [finished.decoded.text for finished in pool.decode(enumerate(utterances))]
    assert [finished.item for finished in found] == list(range(40))
    assert sum(finished.seconds for finished in found) > 0
    texts = [finished.decoded.text for finished in found]
    assert texts == [decoded.text for decoded in BeamDecoder(ABC, model, settings)(utterances)]
    assert changed == [decoded.text for decoded in BeamDecoder(ABC, model, pool.settings)(utterances)]
    assert changed != texts


@needs_flashlight
def test_a_process_that_dies_fails_the_run_in_one_line(make_model: Callable[..., LanguageModel]) -> None:
    with DecodingPool(ABC, make_model(["ab a", "b"]), BeamSettings(), num_workers=1) as pool:
        list(pool.decode([(0, np.zeros((3, 5), np.float32))]))
        (process,) = pool._executor._processes.values()
        process.kill()
        process.join()
        with pytest.raises(RunFailed, match="a process of the beam search died"):
            list(pool.decode([(0, np.zeros((3, 5), np.float32))] * 9))
