"""head.py: which row of a trained head a new letter begins with, and that the others are left as they were."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import (
    LARGE_960H,
    XLS_R_300M,
    Settings,
    no_texts,
    shrink,
    waves,
    write_published_like_checkpoint,
)
from safetensors.torch import load_file, save_file

from errors import UsageError
from head import plan_growth
from languages import nearest_letters
from pretrained import load_model, save_model
from text import LARGE_960H_VOCABULARY, Vocabulary, build_vocabulary

YORUBA = ["àwọn ọmọ ẹ̀gbẹ́ ṣe é", "gbogbo ìwé náà ńlá ú"]
HAUSA = ["ƙofar ɗan uwa ɓera ƴa 'yan"]


def vocabulary(letters: str, first: tuple[str, ...] = ("<pad>", "<unk>", "|")) -> Vocabulary:
    return Vocabulary({token: index for index, token in enumerate([*first, *letters])}, first[0], first[1])


def sources(old: Vocabulary, new: Vocabulary) -> dict[str, str | None]:
    """By token, since ids say nothing to a reader."""
    of_old = {index: token for token, index in old.token_ids.items()}
    growth = plan_growth(old, new, nearest_letters())
    return {token: of_old.get(int(growth.sources[index])) for token, index in new.token_ids.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With biases that tell the outputs apart, as a trained head has."""
    folder = tmp_path / "large_960h"
    write_published_like_checkpoint(folder, shrink(LARGE_960H), "safetensors")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"] = torch.arange(32.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # The same letter, also in the other case and in another spelling of the same character.
        ("abc", "cab", {"c": "c", "a": "a", "b": "b"}),
        ("ABC", "ab", {"a": "A", "b": "B"}),
        ("abAB", "aB", {"a": "a", "B": "B"}),
        ("a\u2126", "\u03a9", {"\u03a9": "\u2126"}),
        # By decomposition, with as many marks as the old head has; tones go first.
        ("oe", "ọéẹ", {"ọ": "o", "é": "e", "ẹ": "e"}),
        ("OE", "ọé", {"ọ": "O", "é": "E"}),
        ("eê", "ế", {"ế": "ê"}),
        ("eé", "ế", {"ế": "é"}),
        ("eêé", "ế", {"ế": "ê"}),
        ("oọ", "ộ", {"ộ": "ọ"}),
        ("иo", "й", {"й": "и"}),
        # By the table.
        ("kdbynea", "ƙɗɓƴŋɛə", {"ƙ": "k", "ɗ": "d", "ɓ": "b", "ƴ": "y", "ŋ": "n", "ɛ": "e", "ə": "e"}),
        ("KDB", "ƙɗɓ", {"ƙ": "K", "ɗ": "D", "ɓ": "B"}),
        ("OSTA", "øßþæ", {"ø": "O", "ß": "S", "þ": "T", "æ": "A"}),
        ("go", "ŋœǿ", {"ŋ": "g", "œ": "o", "ǿ": "o"}),
        ("'", "ʼ", {"ʼ": "'"}),
        # By nothing: marks of their own, other scripts, what the table does not know.
        ("abc", "\u0301жक", {"\u0301": None, "ж": None, "क": None}),
        ("abc", "d1", {"d": None, "1": None}),
    ],
)
def test_sources_of_letters(old: str, new: str, expected: dict[str, str | None]) -> None:
    found = sources(vocabulary(old), vocabulary(new))
    assert {token: source for token, source in found.items() if token not in ("<pad>", "<unk>", "|")} == expected


def test_roles_are_matched_by_what_they_do() -> None:
    old = Vocabulary({"|": 0, "[UNK]": 1, "a": 2, "[PAD]": 3, "<pad>": 4}, "[PAD]", "[UNK]")
    new = Vocabulary({"<pad>": 0, "<unk>": 1, "a": 2, " ": 3}, delimiter_token=" ")
    assert sources(old, new) == {"<pad>": "[PAD]", "<unk>": "[UNK]", "a": "a", " ": "|"}
    without = Vocabulary({"<pad>": 0, "<unk>": 1, "a": 2})
    assert sources(without, new)[" "] is None


def test_both_cases_from_one_keep_one_row_and_copy_the_other() -> None:
    growth = plan_growth(vocabulary("A"), vocabulary("aA"), {})
    assert growth.kept == ("<pad>", "<unk>", "|", "A")
    assert growth.copied == (("a", "A"),)
    assert not growth.is_same


def test_every_letter_of_the_table_is_lower_case_and_leads_to_a_simpler_one() -> None:
    table = nearest_letters()
    for letter, others in table.items():
        assert letter == letter.lower() == unicodedata.normalize("NFC", letter)
        assert letter not in others
        marks = unicodedata.normalize("NFD", letter)[1:]
        assert not marks, f"{letter} decomposes and needs no line"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("texts", [YORUBA, HAUSA])
def test_rows_are_those_of_the_plan_and_the_rest_is_a_new_head(checkpoint: Path, texts: list[str], seed: int) -> None:
    """Against a loop over tokens that looks each row up by hand."""
    settings = {"model_name_or_path": str(checkpoint), "vocabulary": "train", "seed": seed}
    grown = load_model(Settings(**settings), lambda: texts)
    drawn = load_model(Settings(**settings, head="new"), lambda: texts)
    old = load_file(checkpoint / "model.safetensors")
    assert grown.vocabulary.token_ids == drawn.vocabulary.token_ids == build_vocabulary(texts)
    by_hand = {"<pad>": "<pad>", "<unk>": "<unk>", "|": "|", "ƙ": "K", "ɗ": "D", "ɓ": "B", "ƴ": "Y"}
    num_drawn = 0
    for token, index in grown.vocabulary.token_ids.items():
        plain = unicodedata.normalize("NFD", token)[0].upper()
        source = LARGE_960H_VOCABULARY.get(by_hand.get(token, plain))
        num_drawn += source is None
        is_from = (
            old if source is not None else {f"lm_head.{k}": v for k, v in drawn.model.hf.lm_head.state_dict().items()}
        )
        row = index if source is None else source
        head = grown.model.hf.lm_head
        assert torch.equal(head.weight[index], is_from["lm_head.weight"][row]), token
        assert torch.equal(head.bias[index], is_from["lm_head.bias"][row]), token
    assert num_drawn == (2 if texts is YORUBA else 0)  # The two combining marks.
    assert not grown.head_fits
    others = [name for name in old if not name.startswith("lm_head.") and "weight_" not in name]
    assert all(torch.equal(grown.model.hf.state_dict()[name], old[name]) for name in others)


def test_shared_letters_have_the_old_logits(checkpoint: Path) -> None:
    wave = waves([16000])[0]
    old = load_model(Settings(model_name_or_path=str(checkpoint)), no_texts)
    grown = load_model(Settings(model_name_or_path=str(checkpoint), vocabulary="train"), lambda: YORUBA)
    with torch.no_grad():
        before, after = (one.model.eval()(wave[None], [16000])[0] for one in (old, grown))
    for letter in "beglmnow":
        new_id, old_id = grown.vocabulary.token_ids[letter], LARGE_960H_VOCABULARY[letter.upper()]
        assert torch.allclose(after[..., new_id], before[..., old_id], rtol=0, atol=1e-5), letter
    # A copy says what its source says, to the last bit: only training can tell them apart.
    ids = grown.vocabulary.token_ids
    assert torch.allclose(after[..., ids["ọ"]], after[..., ids["o"]], rtol=0, atol=1e-5)


def test_the_same_tokens_in_another_order_are_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(32)
    moved = {token: int(order[index]) for token, index in LARGE_960H_VOCABULARY.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(moved))
    wave = waves([16000])[0]
    old = load_model(Settings(model_name_or_path=str(checkpoint)), no_texts)
    grown = load_model(Settings(model_name_or_path=str(checkpoint), vocabulary=str(tmp_path / "vocab.json")), no_texts)
    assert grown.head_fits
    assert "head: 32 rows kept" in grown.notes
    rows = torch.from_numpy(order)
    assert torch.equal(grown.model.hf.lm_head.weight[rows], old.model.hf.lm_head.weight)
    assert torch.equal(grown.model.hf.lm_head.bias[rows], old.model.hf.lm_head.bias)
    with torch.no_grad():
        before, after = (one.model.eval()(wave[None], [16000])[0] for one in (old, grown))
    assert torch.allclose(after[..., rows], before, rtol=0, atol=1e-6)  # The order of a matrix product may differ.


def test_what_was_done_is_said(checkpoint: Path) -> None:
    loaded = load_model(Settings(model_name_or_path=str(checkpoint), vocabulary="train"), lambda: HAUSA)
    said = next(note for note in loaded.notes if note.startswith("head:"))
    assert said == (
        "head: 13 rows kept, 4 copied (ƙ from K, ƴ from Y, ɓ from B, ɗ from D), 16 of the checkpoint dropped "
        "(<s>, </s>, T, I, H, S, L, M, C, G, P, V and 4 more)"
    )


def test_saved_again_a_grown_head_fits(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_model(Settings(model_name_or_path=str(checkpoint), vocabulary="train"), lambda: YORUBA)
    save_model(loaded, tmp_path / "saved")
    again = load_model(Settings(model_name_or_path=str(tmp_path / "saved")), no_texts)
    assert again.head_fits
    assert torch.equal(again.model.hf.lm_head.weight, loaded.model.hf.lm_head.weight)
    assert again.model.hf.config.vocab_size == len(loaded.vocabulary) == again.model.hf.lm_head.out_features


def test_a_head_of_one_language_of_a_nested_vocabulary_grows(checkpoint: Path) -> None:
    """As MMS has them: {language: {token: id}}, and the tokenizer says whose head it is."""
    nested = {"eng": LARGE_960H_VOCABULARY, "fra": {"<pad>": 0, "<unk>": 1, "|": 2, "Z": 3}}
    (checkpoint / "vocab.json").write_text(json.dumps(nested))
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_lang": "eng"}))
    loaded = load_model(Settings(model_name_or_path=str(checkpoint), vocabulary="train"), lambda: HAUSA)
    old = load_file(checkpoint / "model.safetensors")
    ids = loaded.vocabulary.token_ids
    assert torch.equal(loaded.model.hf.lm_head.weight[ids["ƙ"]], old["lm_head.weight"][LARGE_960H_VOCABULARY["K"]])


def test_a_head_that_nobody_can_read_is_drawn(checkpoint: Path, tmp_path: Path) -> None:
    """No tokenizer, one whose language is not said, one of more tokens than outputs, or no head at all."""
    settings = {"model_name_or_path": str(checkpoint), "vocabulary": "train"}
    cases = [lambda: (checkpoint / "vocab.json").unlink(), lambda: rewrite({"eng": LARGE_960H_VOCABULARY})]
    cases.append(lambda: rewrite(LARGE_960H_VOCABULARY | {"Ω": 32, "Σ": 33}))

    def rewrite(content: object) -> None:
        (checkpoint / "vocab.json").write_text(json.dumps(content))

    for break_tokenizer in cases:
        break_tokenizer()
        loaded = load_model(Settings(**settings), lambda: HAUSA)
        assert "head: new, 17 outputs; the checkpoint's 32 belong to another vocabulary" in loaded.notes
        with pytest.raises(UsageError, match=r"--head grow: .* it lacks a tokenizer that names its outputs; use auto"):
            load_model(Settings(**settings, head="grow"), lambda: HAUSA)
    write_published_like_checkpoint(tmp_path / "xls_r", shrink(XLS_R_300M), "safetensors")
    with pytest.raises(UsageError, match="it lacks a trained head"):
        load_model(Settings(model_name_or_path=str(tmp_path / "xls_r"), vocabulary="train", head="grow"), lambda: HAUSA)


def test_two_copies_of_a_row_part_in_the_first_update(checkpoint: Path) -> None:
    """No noise is added to a copy: labels give the rows different gradients."""
    loaded = load_model(Settings(model_name_or_path=str(checkpoint), vocabulary="train"), lambda: YORUBA)
    head, ids = loaded.model.hf.lm_head, loaded.vocabulary.token_ids
    assert torch.equal(head.weight[ids["ọ"]], head.weight[ids["o"]])
    hidden = torch.randn(40, 1, head.in_features, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(loaded.vocabulary.encode("ọmọ").astype(np.int64))
    log_probs = head(hidden).log_softmax(-1)
    torch.nn.functional.ctc_loss(log_probs, labels, torch.tensor([40]), torch.tensor([3])).backward()
    assert not torch.allclose(head.weight.grad[ids["ọ"]], head.weight.grad[ids["o"]])


def test_a_file_with_a_head_of_another_size_than_it_says_has_none(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["lm_head.weight"][:30].clone(), "lm_head.bias": torch.zeros(30)}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(Settings(model_name_or_path=str(checkpoint)), no_texts)
    assert not loaded.head_fits
    assert "head: new, 32 outputs; there was none" in loaded.notes
