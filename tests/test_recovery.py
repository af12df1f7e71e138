"""Out of memory: what counts as it, how a batch is cut, and that the results are those of the whole batch."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import GROUP, tiny

from data import Batch, Collator, Utterance
from errors import RunFailed
from model import CTCModel, forward_with_loss
from pretrained import LoadedModel
from recovery import Cuts, MemoryLimitExceeded, is_out_of_memory
from text import TextNormalizer

LENGTHS = [9_000, 8_000, 8_000, 4_000, 2_000]
MASKS = {"mask_time_prob": 0.4, "mask_time_length": 2, "mask_feature_prob": 0.3, "mask_feature_length": 4}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny({"model_type": "wav2vec2"} | GROUP | MASKS)


@pytest.fixture
def batch(loaded: LoadedModel) -> Batch:
    """Five clips, longest first, with masks; texts of different lengths."""
    rng = np.random.default_rng(0)
    clips = [rng.integers(-9_000, 9_000, length).astype(np.int16) for length in LENGTHS]
    texts = ["ONE", "TWO THREE", "A", "BE", "C"]
    utterances = [Utterance(f"u{i}", clip, text) for i, (clip, text) in enumerate(zip(clips, texts, strict=True))]
    collate = Collator(TextNormalizer(), loaded.vocabulary, True, loaded.model.hf.config, seed=1)
    return collate(utterances, np.arange(5), epoch=0)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(45_000, [5]), (44_999, [4, 1]), (27_000, [3, 2]), (18_000, [2, 2, 1]), (9_000, [1, 1, 1, 2]), (1, [1] * 5)],
)
def test_pieces_hold_every_row_once_within_the_limit(batch: Batch, limit: int, sizes: list[int]) -> None:
    pieces = batch.split(limit)
    assert [len(piece.ids) for piece in pieces] == sizes
    assert [name for piece in pieces for name in piece.ids] == batch.ids
    assert [text for piece in pieces for text in piece.texts] == batch.texts
    assert torch.equal(torch.cat([piece.labels_L for piece in pieces]), batch.labels_L)
    for piece in pieces:
        rows, samples = piece.input_values_BS.shape
        assert samples == piece.sample_lengths_B.max()
        assert rows == 1 or rows * samples <= limit


def test_promise_1_pieces_have_the_loss_and_gradient_of_the_batch(loaded: LoadedModel, batch: Batch) -> None:
    """Masks included: they belong to the utterance, not to the cut. In fp64, where rounding hides nothing."""
    model = copy.deepcopy(loaded.model.hf).double()
    model = CTCModel(model).train()
    batch = replace(batch, input_values_BS=batch.input_values_BS.double())
    found = []
    for limit in (45_000, 18_000, 1):
        model.zero_grad()
        losses = []
        for piece in batch.split(limit):
            loss_B = forward_with_loss(model, piece, loaded.vocabulary.blank_id)[2]
            loss_B.sum().backward()
            losses.append(loss_B.detach())
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((torch.cat(losses), gradients))
    for losses, gradients in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-5, atol=0)
        assert (gradients - found[0][1]).norm() < 1e-5 * found[0][1].norm()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.99 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 999 bytes"), True),
        (MemoryLimitExceeded("900 MB in use"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of range"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_the_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def run_with_room(cuts: Cuts, batch: Batch, padded_samples: int) -> list[list[str]]:
    """Ids of the pieces that `work` saw in the try that went through; larger pieces run out of memory."""

    def work() -> list[list[str]]:
        seen = []
        for piece in cuts.divide([batch]):
            if piece.input_values_BS.numel() > padded_samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")
            seen.append(piece.ids)
        return seen

    while (seen := cuts.attempt(work)) is None:
        pass
    return seen


def test_cuts_are_halved_until_they_fit_and_kept(batch: Batch) -> None:
    said: list[str] = []
    cuts = Cuts("update", "use less", said.append)
    assert run_with_room(cuts, batch, 45_000) == [["u0", "u1", "u2", "u3", "u4"]]
    assert (cuts.retries, cuts.max_padded_samples, said) == (0, None, [])
    assert run_with_room(cuts, batch, 20_000) == [["u0", "u1"], ["u2", "u3"], ["u4"]]
    assert (cuts.retries, cuts.max_padded_samples) == (1, 22_500)
    assert said == [
        "out of memory in an update, with 5 clips of up to 0.6 s (u0, u1, u2, u3, u4; CUDA out of memory. Tried to "
        "allocate 5 GiB): done again, from now on in cuts of at most 1.4 s of padded audio"
    ]
    run_with_room(cuts, batch, 20_000)
    assert len(said) == 1, "the clips are named once"


def test_a_single_clip_that_does_not_fit_is_named(batch: Batch) -> None:
    cuts = Cuts("evaluation", "cut the clip", lambda _: None)
    with pytest.raises(RunFailed, match=r"in an evaluation with a single clip of 0\.6 s, u0 \(CUDA.*: cut the clip$"):
        run_with_room(cuts, batch, 8_500)


def test_other_errors_pass_through(batch: Batch) -> None:
    def work() -> None:
        next(cuts.divide([batch]))
        raise RuntimeError("shapes differ")

    cuts = Cuts("update", "use less", lambda _: None)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cuts.attempt(work)
    assert cuts.retries == 0
