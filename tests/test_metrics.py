"""Decoding against transformers' tokenizer, error counts against jiwer."""

import random
from dataclasses import astuple

import jiwer
import numpy as np
import pytest
import torch

from metrics import (
    DistinctTexts,
    ErrorCounts,
    LetterCounts,
    Score,
    count_character_errors,
    count_word_errors,
    greedy_decode,
    score_batch,
    score_inputs,
    score_text,
)
from result_layout import COUNT_COLUMNS
from text import LARGE_960H_VOCABULARY, Vocabulary, build_tokenizer, build_vocabulary

YORUBA = ["ọjọ́ tí a máa ń ṣe àjọyọ̀", "ẹ̀kọ́ gbígbà", "ƙasa ɗan ɓangare ʼyan"]
VOCABULARIES = {
    "large_960h": LARGE_960H_VOCABULARY,
    "combining_marks": build_vocabulary(YORUBA),
    "brackets": {"[PAD]": 3, "[UNK]": 2, "|": 0, "a": 1, "\u0301": 4, "'": 5},
}


def random_logits(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with many repeats, blanks and delimiters, as a trained model gives them."""
    batch, frames = 4, 60
    logits_BTV = torch.randn(batch, frames, size, generator=generator)
    logits_BTV = logits_BTV.repeat_interleave(int(torch.randint(1, 4, (), generator=generator)), dim=1)
    logits_BTV[..., :5] += 1.0
    return logits_BTV, torch.randint(0, logits_BTV.shape[1] + 1, (batch,), generator=generator)


@pytest.mark.parametrize("options", [{}, {"do_lower_case": True}, {"clean_up_tokenization_spaces": True}])
@pytest.mark.parametrize("extra_outputs", [0, 3])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_greedy_decode_equals_the_tokenizer(name: str, extra_outputs: int, options: dict) -> None:
    tokenizer = build_tokenizer(VOCABULARIES[name])
    for option, value in options.items():
        setattr(tokenizer, option, value)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    for seed in range(60):
        logits_BTV, lengths_B = random_logits(torch.Generator().manual_seed(seed), len(tokenizer) + extra_outputs)
        rows = zip(logits_BTV.argmax(-1), lengths_B, strict=True)
        expected = [tokenizer.decode(ids_T[:length]) for ids_T, length in rows]
        assert greedy_decode(logits_BTV, lengths_B, vocabulary) == expected
        assert greedy_decode(logits_BTV.argmax(-1), lengths_B, vocabulary) == expected


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ("__HH_E_LL_LLOO", "HELLO"),
        ("|A||_|B|", "A  B"),
        ("AA_A", "AA"),
        ("____", ""),
        ("", ""),
        ("|||", ""),
    ],
)
def test_greedy_decode_literal_table(frames: str, text: str) -> None:
    ids = [[LARGE_960H_VOCABULARY.get(frame, 0) for frame in frames]]
    decoded = greedy_decode(
        torch.tensor(ids, dtype=torch.long), torch.tensor([len(frames)]), Vocabulary(LARGE_960H_VOCABULARY)
    )
    assert decoded == [text]


def test_padded_frames_are_not_decoded() -> None:
    ids_BT = torch.tensor([[7, 24, 5, 5]])
    assert greedy_decode(ids_BT, torch.tensor([2]), Vocabulary(LARGE_960H_VOCABULARY)) == ["AB"]


def test_error_counts_equal_jiwer_on_random_texts() -> None:
    generator = random.Random(0)
    pool = ["a", "b", "ab", "ọjọ́", "ɓa", "it's", "<unk>"]
    references, hypotheses = [], []
    words, characters = ErrorCounts(), ErrorCounts()
    for _ in range(1500):
        reference = " ".join(generator.choices(pool, k=generator.randint(0, 9)))
        hypothesis = (" " * generator.randint(1, 2)).join(generator.choices(pool, k=generator.randint(0, 9)))
        found, expected = count_word_errors(reference, hypothesis), jiwer.process_words(reference, hypothesis)
        assert vars(found) == {name: getattr(expected, name) for name in vars(found)}
        assert found.rate == expected.wer
        found_characters = count_character_errors(reference, hypothesis)
        expected_characters = jiwer.process_characters(reference, hypothesis)
        assert vars(found_characters) == {name: getattr(expected_characters, name) for name in vars(found_characters)}
        words, characters = words + found, characters + found_characters
        references.append(reference)
        hypotheses.append(hypothesis)
    assert words.rate == jiwer.wer(references, hypotheses)
    assert characters.rate == jiwer.cer(references, hypotheses)


def test_error_counts_are_the_least_of_all_alignments() -> None:
    """Brute force: every alignment of two short texts, and the counts of one with the fewest edits."""

    def alignments(reference: str, hypothesis: str) -> set[tuple[int, int, int, int]]:
        """(insertions, deletions, substitutions, hits) of each."""
        if not reference:
            return {(len(hypothesis), 0, 0, 0)}
        if not hypothesis:
            return {(0, len(reference), 0, 0)}
        is_hit = reference[0] == hypothesis[0]
        steps = (
            (reference, hypothesis[1:], (1, 0, 0, 0)),
            (reference[1:], hypothesis, (0, 1, 0, 0)),
            (reference[1:], hypothesis[1:], (0, 0, int(not is_hit), int(is_hit))),
        )
        return {tuple(np.add(step, rest).tolist()) for *texts, step in steps for rest in alignments(*texts)}

    draw = random.Random(0)
    for _ in range(60):
        texts = ["".join(draw.choices("abc", k=draw.randint(0, 5))) for _ in range(2)]
        found, possible = count_character_errors(*texts), alignments(*texts)
        assert astuple(found) in possible
        assert found.errors == min(sum(counts[:3]) for counts in possible)
        assert count_word_errors(" ".join(texts[0]), " ".join(texts[1])) == found


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts", "rate"),
    [
        ("", "", ErrorCounts(), 0.0),
        ("", "a b", ErrorCounts(insertions=2), 2.0),
        ("a b", "", ErrorCounts(deletions=2), 1.0),
        ("a b c", "a x c d", ErrorCounts(1, 0, 1, 2), 2 / 3),
        ("\u1ecdj\u1ecd\u0301", "o\u0323jo\u0323\u0301", ErrorCounts(hits=1), 0.0),
        ("a\u00a0b\tc", "a b c", ErrorCounts(hits=3), 0.0),
    ],
)
def test_word_errors_literal_table(reference: str, hypothesis: str, counts: ErrorCounts, rate: float) -> None:
    assert count_word_errors(reference, hypothesis) == counts
    assert counts.rate == rate


def test_rates_are_pooled_not_averaged() -> None:
    score = score_text("a", "A", "b").score + score_text(" ".join("abcdefgh"), "x", " ".join("abcdefgh")).score
    assert score.wer == 1 / 9
    assert score.raw_wer == (1 + 8) / 2
    assert score.utterances_with_error == 1


def test_score_batch_counts_frames_ties_and_empty_hypotheses() -> None:
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY)
    logits_BTV = torch.zeros(2, 4, 32)
    for frame, token in enumerate("A_|B"):
        logits_BTV[0, frame, LARGE_960H_VOCABULARY.get(token, 0)] = 1.0
    logits_BTV[0, 1, 9] = 1.0 - 5e-5
    logits_BTV[1, :, 0] = 1.0
    score, texts = score_batch(
        logits_BTV, torch.tensor([4, 3]), vocabulary, ["A B", "C"], ["a b", "C"], loss_sum=6.0, labels=4
    )
    assert [text.hypothesis for text in texts] == ["A B", ""]
    assert (score.utterances, score.utterances_with_error, score.empty_hypotheses) == (2, 1, 1)
    assert (score.frames, score.blank_frames, score.near_ties) == (7, 4, 1)
    assert (score.wer, score.raw_wer, score.sentence_error_rate, score.loss) == (1 / 3, 1.0, 0.5, 1.5)
    assert score.blank_fraction == 4 / 7


def test_score_batch_counts_labels_unknowns_and_certainty() -> None:
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY)
    logits_BTV = torch.zeros(2, 4, 32)
    for row, tokens in enumerate((["A", "<unk>", "|", "<unk>"], ["<pad>", "A", "A", "B"])):
        for frame, token in enumerate(tokens):
            logits_BTV[row, frame, LARGE_960H_VOCABULARY[token]] = 3.0
    logits_BTV[1, 3] = float("nan")  # padding
    score, texts = score_batch(logits_BTV, torch.tensor([4, 3]), vocabulary, ["AÉ", "A B"], ["", ""])
    assert [text.hypothesis for text in texts] == ["A<unk> <unk>", "A"]
    assert (score.hypothesis_labels, score.unknown_hypothesis_labels, score.unknown_hypothesis_fraction) == (5, 2, 0.4)
    assert (score.reference_labels, score.unknown_reference_labels, score.label_length_ratio) == (5, 1, 1.0)
    assert score.unknown_reference_fraction == 0.2
    assert score.words.length_ratio == 1.0
    top = torch.tensor([3.0] + [0.0] * 31).softmax(0)[0].item()
    assert score.mean_top_probability == pytest.approx(top)
    assert score.top_probability_deviation == pytest.approx(0, abs=1e-4)


def test_deviation_of_the_top_probability() -> None:
    logits_BTV = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0)) * 3
    score = score_batch(logits_BTV, torch.full((3,), 50), Vocabulary(LARGE_960H_VOCABULARY), [""] * 3, [""] * 3)[0]
    top = logits_BTV.softmax(-1).amax(-1).double()
    assert score.mean_top_probability == pytest.approx(top.mean().item())
    assert score.top_probability_deviation == pytest.approx(top.std(correction=0).item())


def test_scores_of_batches_add_up_to_the_score_of_one() -> None:
    vocabulary = Vocabulary(LARGE_960H_VOCABULARY)
    logits_BTV, lengths_B = random_logits(torch.Generator().manual_seed(3), 32)
    texts = ["A B", "", "HELLO É", "THE CAT"]
    whole = score_batch(logits_BTV, lengths_B, vocabulary, texts, texts)[0]
    parts = [
        score_batch(logits_BTV[start:stop], lengths_B[start:stop], vocabulary, texts[start:stop], texts[start:stop])[0]
        for start, stop in ((0, 1), (1, 4))
    ]
    added = sum((Score.from_vector(part.to_vector()) for part in parts), Score())
    for name, value in vars(whole).items():
        assert getattr(added, name) == (pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("counts", "count"), [((0, 0), 0), ((1, 0), 1), ((700, 0), 700), ((700, 200), 900), ((900, 900), 1000)]
)
def test_distinct_texts_are_counted_up_to_the_cap_in_any_order(counts: tuple[int, int], count: int) -> None:
    first = [f"a{index % max(counts[0], 1)}" for index in range(counts[0] * 2)]
    second = [f"b{index}" for index in range(counts[1])] + first[:10]
    one, two = DistinctTexts.of(first), DistinctTexts.of(second)
    assert len(one + two) == len(DistinctTexts.of(first + second)) == count
    assert one + two == two + one == DistinctTexts.of(second + first)
    score = Score(distinct_hypotheses=one + two)
    assert Score.from_vector(score.to_vector()) == score


@pytest.mark.parametrize(
    ("scale", "offset", "is_fit"),
    [
        (1.0, 0.0, True),
        (0.05, 0.01, True),
        (0.005, 0.0, False),
        (0.0, 0.0, False),
        (20.0, 0.0, False),
        (0.1, 0.3, False),
    ],
)
def test_inputs_out_of_sane_limits_are_counted(scale: float, offset: float, is_fit: bool) -> None:
    signal = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * scale + offset
    padded = torch.cat([signal, torch.zeros(1, 9000)], dim=1)
    assert score_inputs(padded, torch.tensor([4000])).unfit_inputs == int(not is_fit)


def test_vectors_hold_scores_whole() -> None:
    one = score_text("a b c", "A b", "a x").score + Score(
        utterances=1, frames=70, blank_frames=9, loss_sum=1.25, labels=5
    )
    two = score_text("d", "d", "d e f").score + Score(utterances=1, frames=2**40, near_ties=3, top_probability_sum=0.5)
    for score in (one, two, one + two, Score()):
        assert Score.from_vector(score.to_vector()) == score
        assert len(score.to_vector()) == len(Score().to_vector())
    empty = Score()
    assert (empty.wer, empty.loss, empty.blank_fraction, empty.sentence_error_rate) == (0.0, 0.0, 0.0, 0.0)
    assert (empty.mean_top_probability, empty.top_probability_deviation, empty.empty_fraction) == (0.0, 0.0, 0.0)
    assert (empty.label_length_ratio, empty.unknown_reference_fraction, empty.unknown_hypothesis_fraction) == (0, 0, 0)
    assert (empty.words.length_ratio, empty.unfit_input_fraction) == (0.0, 0.0)


def test_letters_are_counted_where_they_stand() -> None:
    letters = LetterCounts()
    letters.add("ọjọ́ kan", "ojọ́ an")
    letters.add("ab ab", "ab ab")
    letters.add("ab", "xabx")
    assert letters.occurrences == {"ọ": 2, "\u0301": 1, "j": 1, "k": 1, "a": 4, "n": 1, "b": 3}
    missed = {letter: letters.recall(letter) for letter in letters.occurrences if letters.recall(letter) < 1}
    assert missed == {"ọ": 0.5, "k": 0.0}
    assert (letters + letters).recall("ọ") == 0.5


def test_letters_found_and_missed_are_the_character_errors() -> None:
    """Over random texts: every letter is a hit, or a deletion or substitution of the character counts."""
    draw = random.Random(0)
    for _ in range(200):
        reference, hypothesis = ("".join(draw.choices("ab", k=draw.randint(0, 12))) for _ in range(2))
        letters, errors = LetterCounts(), count_character_errors(reference, hypothesis)
        letters.add(reference, hypothesis)
        assert letters.occurrences.total() == errors.reference_length
        assert letters.hits.total() == errors.hits


def test_counts_of_a_text_are_its_errors_by_name() -> None:
    text = score_text("a b c", "A b c", "a x")
    counts = dict(zip(COUNT_COLUMNS, text.counts, strict=True))
    assert (counts["word_deletions"], counts["word_substitutions"]) == (1, 1)
    assert sum(counts[f"character_{part}"] for part in ("deletions", "substitutions", "hits")) == 5
