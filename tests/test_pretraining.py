"""pretraining.py and its batches against transformers, and against themselves when an update is cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import (
    GROUP,
    LARGE_960H,
    LAYER,
    STILL,
    TINY,
    XLS_R_300M,
    shrink,
    write_published_like_checkpoint,
)  # fmt: skip
from architectures import Settings as CTCSettings
from test_model import Questions
from transformers import (
    MODEL_FOR_PRETRAINING_MAPPING,
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
)  # fmt: skip
from transformers.models.wav2vec2 import modeling_wav2vec2

from data import BatchPlan, CutSettings, ShardDataset, Utterance, evaluation_loader, training_loader
from errors import UsageError
from model import draw_masks, num_frames
from pretrained import (
    LoadedPretraining,
    _quiet_transformers,
    load_model,
    load_pretraining_model,
    save_pretraining_model,
)  # fmt: skip
from pretraining import (
    PretrainingModel,
    collapse_reason,
    diversity,
    diversity_gradient,
    draw_gumbel_noise,
    gumbel_temperature,
    perplexity,
    pretraining_losses,
)
from pretraining_data import PretrainingBatch, PretrainingCollator, PretrainingMasks, draw_distractors, shortest_samples

SMALL_CODES = {
    "codevector_dim": 24, "proj_codevector_dim": 20, "num_codevector_groups": 2, "num_codevectors_per_group": 12,
    "num_negatives": 7, "diversity_loss_weight": 0.5,
}  # fmt: skip
FAMILIES = [
    pytest.param({"model_type": "wav2vec2", **GROUP}, id="wav2vec2-group"),
    pytest.param({"model_type": "wav2vec2", **LAYER}, id="wav2vec2-layer"),
    pytest.param(
        {"model_type": "wav2vec2-conformer", "feat_extract_norm": "group", "conformer_conv_dropout": 0.0},
        id="conformer-group",
    ),
]
TEMPERATURE = 1.7
MASKS = PretrainingMasks(mask_time_length=3)
# No two alike, so that every micro-batch is padded; the last two have no two frames to tell apart.
LENGTHS = [1600, 933, 1200, 700, 40, 12]


@dataclass(frozen=True)
class Settings:
    """The fields that load_pretraining_model reads."""

    encoder_settings: ClassVar[dict[str, float]] = {}
    model_name_or_path: str | None = None
    model_config: dict[str, Any] | None = None
    model_overrides: dict[str, Any] | None = None
    freeze_feature_encoder: bool = False
    gradient_checkpointing: bool = False
    seed: int = 7


def tiny(fields: dict[str, Any], **settings: Any) -> LoadedPretraining:
    loaded = load_pretraining_model(Settings(model_config={**TINY, **STILL, **SMALL_CODES, **fields}, **settings))
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.fill_(0.5)
    return loaded


def speak(lengths: Sequence[int]) -> list[Utterance]:
    rng = np.random.default_rng(3)
    return [
        Utterance(f"u{row}", (rng.normal(size=length) * 3000).astype(np.int16), "")
        for row, length in enumerate(lengths)
    ]


def collate(model: PretrainingModel, rows: Sequence[int], lengths: Sequence[int] = LENGTHS, epoch: int | None = 1):
    of_set = PretrainingCollator(True, model.hf.config, MASKS, seed=5)
    utterances = speak(lengths)
    return of_set([utterances[row] for row in rows], np.asarray(rows), epoch)


def as_double(model: PretrainingModel, batch: PretrainingBatch) -> PretrainingBatch:
    return replace(batch, input_values_BS=batch.input_values_BS.to(next(model.parameters()).dtype))


def gradients(model: PretrainingModel) -> dict[str, torch.Tensor]:
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    """Relative to each tensor's largest value; those of keys' biases are zero but for rounding."""
    assert found.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, value in found.items():
        scale = max(float(expected[name].abs().max()), 1e-3 * largest)
        torch.testing.assert_close(
            value, expected[name], rtol=rtol, atol=rtol * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- Against transformers ------------------------------------------------------------------------------------------


def plain_transformers(ours: PretrainingModel) -> torch.nn.Module:
    config = ours.hf.config
    theirs = MODEL_FOR_PRETRAINING_MAPPING[type(config)](config)
    theirs.load_state_dict(ours.hf.state_dict())
    theirs = theirs.to(next(ours.parameters()).dtype).train(ours.training)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # Keeps its statistics here in training too.
            module.eval()
    return theirs


def noise_on_all_frames(ours: PretrainingModel, batch: PretrainingBatch) -> torch.Tensor:
    """Our noise where transformers draws it: for each frame, masked or not, [B x T x G, V]."""
    groups, codes = ours.num_groups, ours.num_codes // ours.num_groups
    rows, frames = batch.time_mask_BT.shape
    dtype = next(ours.parameters()).dtype
    of_masked = draw_gumbel_noise(batch, torch.zeros(*batch.masked_frames_BM.shape, groups, codes, dtype=dtype))
    noise = torch.zeros(rows, frames, groups, codes, dtype=dtype)
    for row, count in enumerate(batch.num_masked_B.tolist()):
        noise[row, batch.masked_frames_BM[row, :count]] = of_masked[row, :count]
    return noise.flatten(0, 2)


def their_distractors(batch: PretrainingBatch) -> torch.Tensor:
    """As transformers takes them: frames of the flattened batch, for each frame."""
    rows, frames = batch.time_mask_BT.shape
    found = torch.zeros(rows, frames, batch.distractors_BMK.shape[-1], dtype=torch.long)
    for row, count in enumerate(batch.num_masked_B.tolist()):
        own = batch.masked_frames_BM[row, :count]
        found[row, own] = own[batch.distractors_BMK[row, :count].long()] + row * frames
    return found


@pytest.fixture
def exact_choice(monkeypatch: pytest.MonkeyPatch):
    """Gives transformers our noise, and a straight-through choice without rounding (theirs hides equal codes)."""

    def install(noise: torch.Tensor) -> None:
        def choose(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
            assert hard and logits.shape == noise.shape
            # They cast the logits to fp32 before; in double precision the comparison would end there.
            soft = ((logits.to(noise.dtype) + noise) / tau).softmax(-1)
            return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype) + (soft - soft.detach())

        monkeypatch.setattr(F, "gumbel_softmax", choose)

    return install


@pytest.mark.parametrize("fields", FAMILIES)
def test_loss_and_gradient_are_those_of_transformers(fields, exact_choice):
    """One batch, the same masks, distractors and noise. Equal lengths: padding is where transformers differs."""
    ours = tiny(fields).model.train()
    batch = collate(ours, [0, 1, 2], [1600, 1600, 1600])
    assert batch.num_masked > 50
    theirs = plain_transformers(ours)
    theirs.set_gumbel_temperature(TEMPERATURE)
    exact_choice(noise_on_all_frames(ours, batch))
    expected = theirs(
        batch.input_values_BS, mask_time_indices=batch.time_mask_BT, sampled_negative_indices=their_distractors(batch)
    )
    loss, objective, statistics = pretraining_losses(ours, batch, None, TEMPERATURE)
    torch.testing.assert_close(loss.sum(), expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.contrastive_B.sum(), expected.contrastive_loss.detach(), rtol=1e-5, atol=0)
    marginal = statistics.code_prob_sum_BGV.sum(0) / batch.num_masked
    torch.testing.assert_close(perplexity(marginal), expected.codevector_perplexity.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        diversity(marginal) * batch.num_masked, expected.diversity_loss.detach(), rtol=1e-5, atol=0
    )
    expected.loss.backward()
    objective.sum().backward()
    mine, other = gradients(ours), {f"hf.{name}": one.grad for name, one in theirs.named_parameters()}
    # What never gets a gradient is not trained here, and has none there.
    assert_close(mine, {name: grad for name, grad in other.items() if grad is not None}, rtol=1e-5)


def test_loss_in_evaluation_is_that_of_transformers():
    """The most probable code, no noise, masks all the same."""
    ours = tiny({"model_type": "wav2vec2", **LAYER}).model.eval()
    batch = collate(ours, [0, 1], [1600, 1600], epoch=None)
    assert batch.gumbel_seeds is None
    with torch.no_grad():
        expected = plain_transformers(ours)(
            batch.input_values_BS,
            mask_time_indices=batch.time_mask_BT,
            sampled_negative_indices=their_distractors(batch),
        )
        loss, _, statistics = pretraining_losses(ours, batch)
    torch.testing.assert_close(loss.sum(), expected.loss, rtol=1e-5, atol=0)
    counts = statistics.code_prob_sum_BGV.sum(0)
    assert counts.sum(-1).tolist() == [batch.num_masked] * 2, "each frame has one code of each group"
    torch.testing.assert_close(perplexity(counts / batch.num_masked), expected.codevector_perplexity)


# --- Promise 1 -----------------------------------------------------------------------------------------------------


def update_in_cuts(
    model: PretrainingModel, cuts: Sequence[Sequence[int]], extra_padding: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradient and loss of an update whose utterances pass in these cuts, as a loop over ranks and micro-batches."""
    batches = [as_double(model, collate(model, cut)) for cut in cuts if len(cut)]
    if extra_padding:
        batches = [
            replace(batch, input_values_BS=F.pad(batch.input_values_BS, (0, extra_padding))) for batch in batches
        ]
        batches = [replace(batch, time_mask_BT=pad_mask(model, batch)) for batch in batches]
    num_masked = sum(batch.num_masked for batch in batches)
    marginal = sum(model.code_prob_sum(batch) for batch in batches) / num_masked
    losses = torch.zeros(len(LENGTHS), dtype=torch.float64)
    for batch in batches:
        loss, objective, _ = pretraining_losses(model, batch, marginal, TEMPERATURE)
        (objective.sum() / num_masked).backward()
        losses[torch.from_numpy(batch.rows)] = loss.detach().double()
    return gradients(model), losses / num_masked


def pad_mask(model: PretrainingModel, batch: PretrainingBatch) -> torch.Tensor:
    config = model.hf.config
    frames = num_frames(batch.input_values_BS.shape[1], config.conv_kernel, config.conv_stride)
    return F.pad(batch.time_mask_BT, (0, frames - batch.time_mask_BT.shape[1]))


CUTS = {
    "two micro-batches": [[0, 2, 4], [1, 3, 5]],
    "one utterance each": [[0], [1], [2], [3], [4], [5]],
    "an empty rank": [[0, 1, 2, 3, 4, 5], []],
    "unequal": [[5], [3, 1], [0, 4, 2]],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", FAMILIES)
def test_promise_1_gradient_and_loss_of_pretraining_do_not_depend_on_the_cut(fields, checkpointing):
    """Double precision, so that what is compared is the arithmetic; the reference is autograd through the whole."""
    model = tiny(fields, gradient_checkpointing=checkpointing).model.double().train()
    whole = as_double(model, collate(model, range(len(LENGTHS))))
    assert whole.num_masked_B.tolist()[4:] == [0, 0]
    loss, objective, _ = pretraining_losses(model, whole, None, TEMPERATURE)
    assert loss is objective
    (objective.sum() / whole.num_masked).backward()
    expected, losses = gradients(model), loss.detach() / whole.num_masked
    assert expected.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
    for name, cuts in CUTS.items():
        found, found_losses = update_in_cuts(model, cuts)
        torch.testing.assert_close(found_losses, losses, rtol=1e-6, atol=0, msg=name)
        assert_close(found, expected, rtol=1e-5)
    found, _ = update_in_cuts(model, CUTS["two micro-batches"], extra_padding=777)
    assert_close(found, expected, rtol=1e-5)


def test_promise_1_in_single_precision():
    model = tiny({"model_type": "wav2vec2", **GROUP}).model.train()
    expected, losses = update_in_cuts(model, [range(len(LENGTHS))])
    for cuts in CUTS.values():
        found, found_losses = update_in_cuts(model, cuts)
        torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)
        assert_close(found, expected, rtol=2e-5)


def test_promise_1_marginals_of_the_parts_alone_would_not_add_up():
    """So that the tests above are known to test something: each part's own diversity is another objective."""
    model = tiny({"model_type": "wav2vec2", **LAYER}).model.double().train()
    expected, _ = update_in_cuts(model, [range(len(LENGTHS))])
    num_masked = collate(model, range(len(LENGTHS))).num_masked
    for cut in CUTS["one utterance each"]:
        batch = as_double(model, collate(model, cut))
        (pretraining_losses(model, batch, None, TEMPERATURE)[1].sum() / num_masked).backward()
    found = gradients(model)
    name = "hf.quantizer.weight_proj.weight"
    assert (found[name] - expected[name]).norm() > 0.01 * expected[name].norm()


@pytest.mark.parametrize("fields", FAMILIES)
def test_promise_2_neighbours_and_padding_change_nothing_in_evaluation(fields):
    model = tiny(fields).model.double().eval()
    with torch.no_grad():
        together = pretraining_losses(model, as_double(model, collate(model, range(6), epoch=None)))[2]
        for row in range(6):
            alone = pretraining_losses(model, as_double(model, collate(model, [row], epoch=None)))[2]
            for name in vars(alone):
                torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], rtol=1e-6, atol=1e-9)


def test_marginal_of_the_pre_pass_is_that_of_the_pass():
    model = tiny({"model_type": "wav2vec2", **GROUP}).model.train()
    batch = collate(model, range(6))
    sums = pretraining_losses(model, batch, None, TEMPERATURE)[2].code_prob_sum_BGV.sum(0)
    torch.testing.assert_close(model.code_prob_sum(batch), sums, rtol=1e-6, atol=1e-7)
    assert float(sums[0].sum()) == pytest.approx(batch.num_masked, rel=1e-5)


# --- The losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 200.0])
def test_gradient_of_diversity_is_autograds_also_where_probabilities_underflow(sharpness):
    logits = (sharpness * torch.randn(2, 12, generator=torch.Generator().manual_seed(0))).requires_grad_()
    marginal = logits.softmax(-1)
    if sharpness == 200.0:
        assert (marginal == 0).any(), "otherwise nothing is tested"
    (expected,) = torch.autograd.grad(diversity(marginal), logits, retain_graph=True)
    (found,) = torch.autograd.grad((marginal * diversity_gradient(marginal)).sum(), logits)
    assert expected.isfinite().all() and found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_perplexity_counts_codes_in_use():
    uniform, single = torch.full((2, 12), 1 / 12), F.one_hot(torch.tensor([3, 4]), 12).float()
    assert float(perplexity(uniform)) == pytest.approx(24)
    assert float(diversity(uniform)) == pytest.approx(0, abs=1e-6)
    assert float(perplexity(single)) == pytest.approx(2), "one code of each group"
    assert float(diversity(single)) == pytest.approx(22 / 24)


def test_distractors_with_the_same_code_are_left_out():
    """One code for everything leaves nothing to choose between: loss 0 and all correct, as a collapse looks."""
    model = tiny({"model_type": "wav2vec2", **LAYER}).model.eval()
    batch = collate(model, [0, 1], epoch=None)
    with torch.no_grad():
        model.hf.quantizer.weight_proj.weight.zero_()
        statistics = pretraining_losses(model, batch)[2]
    assert statistics.contrastive_B.tolist() == [0.0, 0.0]
    assert statistics.correct_B.tolist() == statistics.masked_B.tolist() == batch.num_masked_B.tolist()


def test_temperature_of_the_choice_decays_to_its_floor():
    assert gumbel_temperature(0, 2.0, 0.5, 0.9) == 2.0
    assert gumbel_temperature(2, 2.0, 0.5, 0.9) == pytest.approx(1.62)
    assert gumbel_temperature(1000, 2.0, 0.5, 0.9) == 0.5


def test_noise_is_gumbels_and_each_rows_own():
    model = tiny({"model_type": "wav2vec2", **LAYER}).model.train()
    batch = collate(model, range(6))
    noise = draw_gumbel_noise(batch, torch.zeros(*batch.masked_frames_BM.shape, 2, 12))
    state = torch.random.get_rng_state()
    alone = draw_gumbel_noise(collate(model, [3]), torch.zeros(1, int(batch.num_masked_B[3]), 2, 12))
    assert torch.equal(alone[0], noise[3, : alone.shape[1]]), "whatever the neighbours and the padding"
    assert torch.equal(state, torch.random.get_rng_state())
    drawn = noise[0, : batch.num_masked_B[0]]
    # Mean of the distribution: Euler's constant; its deviation is 1.28, over about 1,000 draws.
    assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.15)
    assert not torch.equal(draw_gumbel_noise(collate(model, [3], epoch=2), torch.zeros_like(alone)), alone)


# --- Batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [9, 10, 14, 37, 250, 749])
def test_masked_share_of_pretraining_is_that_of_transformers(frames):
    masks, rng = PretrainingMasks(), np.random.default_rng(1)
    ours = np.array([draw_masks(frames, 32, masks, rng)[0] for _ in range(2000)])
    if frames < 10:
        assert not ours.any()
        return
    state = np.random.get_state()
    np.random.seed(1)
    theirs = np.concatenate(
        [modeling_wav2vec2._compute_mask_indices((1, frames), 0.65, 10, min_masks=2) for _ in range(2000)]
    )
    np.random.set_state(state)
    assert abs(ours.mean() - theirs.mean()) < 0.02
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.08
    if frames == 749:
        assert 0.44 < ours.mean() < 0.54, "about half, as published"


def test_distractors_are_uniform_over_the_other_masked_frames():
    drawn = draw_distractors(5, 40_000, np.random.default_rng(0))
    assert drawn.dtype == np.int32
    for own, of_frame in enumerate(drawn):
        counts = np.bincount(of_frame, minlength=5)
        assert counts[own] == 0
        assert np.abs(np.delete(counts, own) / 40_000 - 0.25).max() < 0.01


def test_distractors_are_masked_frames_of_the_same_utterance():
    model = tiny({"model_type": "wav2vec2", **LAYER}).model
    batch = collate(model, range(6))
    frames = batch.time_mask_BT.shape[1]
    for row, of_row in enumerate(their_distractors(batch)):
        own = batch.time_mask_BT[row]
        assert torch.equal(own.nonzero()[:, 0], batch.masked_frames_BM[row, : batch.num_masked_B[row]])
        drawn = of_row[own] - row * frames
        assert own[drawn].all()
        assert (drawn != own.nonzero()).all()


def test_draws_depend_on_seed_epoch_row_and_copy_alone():
    model = tiny({"model_type": "wav2vec2", **LAYER}).model
    utterances, rows = speak(LENGTHS), np.array([3, 0])
    of_set = PretrainingCollator(True, model.hf.config, MASKS, seed=5)
    first = of_set([utterances[3], utterances[0]], rows, 2, np.array([0, 0]))
    again = of_set([utterances[0]], rows[1:], 2)
    count = int(first.num_masked_B[1])
    assert torch.equal(first.distractors_BMK[1, :count], again.distractors_BMK[0])
    assert torch.equal(first.time_mask_BT[1], again.time_mask_BT[0])
    assert first.gumbel_seeds[1:] == again.gumbel_seeds
    for other in (
        of_set([utterances[0]], rows[1:], 3),
        of_set([utterances[0]], rows[1:], 2, np.array([1])),
        replace(of_set, seed=6)([utterances[0]], rows[1:], 2),
    ):
        assert not torch.equal(other.time_mask_BT, again.time_mask_BT)
        assert other.gumbel_seeds != again.gumbel_seeds
    evaluated = [replace(of_set, seed=seed)([utterances[0]], rows[1:]) for seed in (5, 6)]
    assert torch.equal(evaluated[0].time_mask_BT, evaluated[1].time_mask_BT), "dev losses of two runs compare"
    assert torch.equal(evaluated[0].distractors_BMK, evaluated[1].distractors_BMK)


@pytest.mark.parametrize("epoch", [None, 4])
def test_targets_are_known_before_a_clip_is_read(epoch):
    model = tiny({"model_type": "wav2vec2", **LAYER}).model
    of_set = PretrainingCollator(True, model.hf.config, MASKS, seed=5)
    counted = of_set.count_targets(np.arange(6), np.asarray(LENGTHS), epoch)
    assert counted.tolist() == collate(model, range(6), epoch=epoch).num_masked_B.tolist()
    assert counted[:4].all() and not counted[4:].any()


def test_shortest_clip_that_is_masked():
    masks, config = PretrainingMasks(), Wav2Vec2Config()
    shortest = shortest_samples(masks, config)
    assert num_frames(shortest, config.conv_kernel, config.conv_stride) == 10
    assert num_frames(shortest - 1, config.conv_kernel, config.conv_stride) == 9
    of_set = PretrainingCollator(True, config, masks, seed=5)
    rows = np.arange(500)
    assert of_set.count_targets(rows, np.full(500, shortest), 0).min() == 10
    assert of_set.count_targets(rows, np.full(500, shortest - 1), 0).max() == 0


def test_pieces_of_a_batch_are_the_batches_of_their_rows():
    """Out of memory: `recovery.Cuts` divides what was loaded, which must be what would have been loaded."""
    model = tiny({"model_type": "wav2vec2", **LAYER}).model
    whole = collate(model, range(6))
    pieces = whole.split(1200 * 2)
    assert [piece.rows.tolist() for piece in pieces] == [[0], [1, 2], [3, 4, 5]]
    for piece in pieces:
        alone = collate(model, piece.rows.tolist())
        for name, value in vars(alone).items():
            found = getattr(piece, name)
            same = torch.equal(found, value) if isinstance(value, torch.Tensor) else np.all(found == value)
            assert same, name
    assert whole.split(10**9) == [whole]
    moved = whole.to(torch.device("meta"))
    assert moved.time_mask_BT.is_meta and moved.distractors_BMK.is_meta and moved.masked_frames_BM.is_meta
    assert not moved.num_masked_B.is_meta and not moved.sample_lengths_B.is_meta


# --- From files and to files ---------------------------------------------------------------------------------------


def opened_by_transformers(folder: Path) -> tuple[Wav2Vec2ForPreTraining, dict[str, Any]]:
    with _quiet_transformers():
        return Wav2Vec2ForPreTraining.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("weight_norm", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_released_checkpoint_goes_through_pretraining_into_fine_tuning(tmp_path, file_format, weight_norm):
    write_published_like_checkpoint(tmp_path / "released", shrink(XLS_R_300M), file_format, weight_norm)
    loaded = load_pretraining_model(Settings(model_name_or_path=str(tmp_path / "released")))
    # The published file lacks it, and nothing else.
    assert loaded.notes == ["weights: wav2vec2.masked_spec_embed drawn anew, not in the checkpoint"]
    assert loaded.feature_extractor.return_attention_mask is True
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.125)
    save_pretraining_model(loaded, tmp_path / "pretrained")
    theirs, info = opened_by_transformers(tmp_path / "pretrained")
    assert not any(info.values()), "no key is missing, unexpected or of another shape"
    weights = theirs.state_dict()
    assert weights.keys() == loaded.model.hf.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.hf.state_dict().items())
    assert theirs.config.mask_time_prob == 0.075, "fine-tuning masks as the released checkpoint would"
    assert {path.name for path in (tmp_path / "pretrained").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip

    tuned = load_model(CTCSettings(model_name_or_path=str(tmp_path / "pretrained"), vocabulary="train"), lambda: ["ab"])
    encoder = tuned.model.hf.wav2vec2.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in loaded.model.hf.wav2vec2.state_dict().items())
    assert tuned.notes[1:] == [
        "head: new, 5 outputs; there was none",
        "weights: 7 of the checkpoint not used (project_hid, project_q, quantizer)",
    ]
    again = load_pretraining_model(Settings(model_name_or_path=str(tmp_path / "pretrained")))
    assert again.notes == []


def test_fine_tuned_checkpoint_gets_a_new_quantizer(tmp_path):
    write_published_like_checkpoint(tmp_path / "tuned", shrink(LARGE_960H), "safetensors")
    first, again, other = (
        load_pretraining_model(Settings(model_name_or_path=str(tmp_path / "tuned"), seed=seed)) for seed in (7, 7, 8)
    )
    assert first.notes == [
        "weights: project_hid.bias, project_hid.weight, project_q.bias, project_q.weight, quantizer.codevectors and 3 "
        "more drawn anew, not in the checkpoint",
        "weights: 2 of the checkpoint not used (lm_head)",
    ]
    weights = [one.model.hf.state_dict() for one in (first, again, other)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), f"{name} is drawn by the seed"
    for name in ("quantizer.codevectors", "quantizer.weight_proj.weight", "project_q.weight", "project_hid.weight"):
        assert not torch.equal(weights[0][name], weights[2][name])
    assert torch.equal(weights[0]["wav2vec2.feature_projection.projection.weight"],
                       weights[2]["wav2vec2.feature_projection.projection.weight"])  # fmt: skip


@pytest.mark.parametrize("of", ["model_config", "checkpoint"])
def test_a_model_that_shall_not_mask_in_fine_tuning_is_pretrained_all_the_same(tmp_path, of):
    """Transformers gives such a model no mask embedding; here it has one, and keeps its configuration."""
    unmasked = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    if of == "model_config":
        loaded = tiny({"model_type": "wav2vec2", **LAYER, **unmasked})
    else:
        plain = Wav2Vec2ForPreTraining(Wav2Vec2Config(**{**TINY, **SMALL_CODES, **unmasked}))
        plain.save_pretrained(tmp_path / "plain")
        loaded = load_pretraining_model(Settings(model_name_or_path=str(tmp_path / "plain")))
        assert loaded.notes[0].startswith("weights: wav2vec2.masked_spec_embed drawn anew")
    model = loaded.model.train()
    pretraining_losses(model, collate(model, [0, 1]), None, TEMPERATURE)[1].sum().backward()
    assert model.hf.wav2vec2.masked_spec_embed.grad.any()
    save_pretraining_model(loaded, tmp_path / "pretrained")
    theirs, info = opened_by_transformers(tmp_path / "pretrained")
    assert not info["missing_keys"] and theirs.config.mask_time_prob == 0.0
    tuned = load_model(CTCSettings(model_name_or_path=str(tmp_path / "pretrained"), vocabulary="train"), lambda: ["ab"])
    assert not tuned.model.masks_time
    again = load_pretraining_model(Settings(model_name_or_path=str(tmp_path / "pretrained")))
    assert torch.equal(again.model.hf.wav2vec2.masked_spec_embed, model.hf.wav2vec2.masked_spec_embed)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("hubert", "predicts clusters of an earlier model"),
        ("wavlm", "predicts clusters of an earlier model"),
        ("data2vec-audio", "predicts what a slower copy of itself hears"),
        ("unispeech", "learns from transcripts too"),
        ("unispeech-sat", "learns from clusters and speakers"),
        ("whisper", "has no such model"),
        (None, "has no such model"),
    ],
)
def test_families_with_another_objective_are_refused_by_name(family, reason):
    with pytest.raises(UsageError, match=f"model_type is {family!r}, which {reason}.*wav2vec2, wav2vec2-conformer"):
        load_pretraining_model(Settings(model_config={"model_type": family}))


def test_checkpoint_of_another_family_is_refused_by_name(tmp_path):
    HubertForCTC(HubertConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"config.json: model_type is 'hubert', which predicts clusters"):
        load_pretraining_model(Settings(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_codevectors_per_group": 13}, "disagree on the shape of quantizer"),
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"num_negativs": 5}, "unknown field num_negativs, nearest is num_negatives"),
        ({"vocab_size": 5}, "vocab_size follows from the vocabulary"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, overrides, message):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), "safetensors")
    with pytest.raises(UsageError, match=message):
        load_pretraining_model(Settings(model_name_or_path=str(tmp_path), model_overrides=overrides))


def test_groups_that_do_not_divide_the_code_are_refused():
    with pytest.raises(UsageError, match=r"model_config does not make a wav2vec2 model: .*codevector_dim"):
        tiny({"model_type": "wav2vec2", "num_codevector_groups": 5})


# --- Collapse ------------------------------------------------------------------------------------------------------


def log_of(
    perplexities: Sequence[float],
    losses: Sequence[float] | float = 4.0,
    accuracies: Sequence[float] | float = 0.1,
    every: int = 50,
) -> list[dict[str, float]]:
    """Rows of a training log, with one of an evaluation between them, which has no figures of training."""
    count = len(perplexities)
    losses, accuracies = (list(np.broadcast_to(one, count)) for one in (losses, accuracies))
    rows = []
    for number, values in enumerate(zip(perplexities, losses, accuracies, strict=True), 1):
        names = ("code_perplexity", "contrastive_loss", "accuracy")
        rows.append({"step": number * every, **dict(zip(names, values, strict=True))})
        rows.append({"step": number * every, **dict.fromkeys(names, math.nan), "eval_loss": 4.0})
    return rows  # fmt: skip


def test_the_collapse_of_transformers_14387_is_named():
    """Its log: loss 0.000, perplexity 2.000, for good."""
    reason = collapse_reason(
        log_of([80, 40, 9, 2, 2, 2, 2, 2], [4, 3, 1, 0, 0, 0, 0, 0], [0.1] * 3 + [1.0] * 5), 2, 640
    )
    assert reason.startswith("pre-training has collapsed at step 400: the code perplexity is 2.00 of 640")
    assert "loss is 0.0000 and the accuracy 100.0%" in reason
    assert all(word in reason for word in ("#14387", "#12934", "--learning_rate", "--warmup_steps", "--diversity_loss"))
    assert "\n" not in reason


def test_one_code_per_group_is_a_collapse_while_the_loss_is_still_high():
    log = log_of([80, 20, 2.1, 2.05, 2.02, 2.01, 2.0])
    assert "each of the 2 groups uses one code" in collapse_reason(log, 2, 640)
    assert "no row since step 150 has more than 2.10" in collapse_reason(log, 2, 640)


def test_a_collapse_needs_several_rows():
    for count in range(1, 5):
        assert collapse_reason(log_of([80, 60] + [2.0] * count, 0.0, 1.0), 2, 640) is None
    assert collapse_reason(log_of([80, 60] + [2.0] * 5, 0.0, 1.0), 2, 640)
    assert collapse_reason(log_of([80, 2, 2, 2, 9, 2, 2]), 2, 640) is None, "one row above in between"


@pytest.mark.parametrize(
    "log",
    [
        log_of([]),
        log_of([2.0, 2.1, 2.0, 2.2, 2.6, 4, 9, 30, 90]),  # a healthy start: few codes, then more
        log_of([2.0] * 8),  # not yet: 400 updates, which may be the warm-up
        log_of(np.linspace(2.0, 2.19, 30)),  # over 1,000 updates, and rising
        log_of([300, 250, 200, 150, 120, 100, 90, 80, 70, 64]),  # a slow decline, as in the middle of good runs
        log_of([18] * 8, 3.6, 0.5),  # fairseq#2981
        log_of([30] * 8, 0.04, 0.99),  # an easy corpus, with fifteen codes of each group
        [{"step": 50, "train_loss": 1.0}],
    ],
)
def test_what_may_still_learn_is_no_collapse(log):
    assert collapse_reason(log, 2, 640) is None


def test_a_collapse_needs_some_updates_however_often_they_are_logged():
    assert collapse_reason(log_of([80] * 5 + [2.0] * 19, every=1), 2, 640) is None
    assert collapse_reason(log_of([80] * 5 + [2.0] * 21, every=1), 2, 640)
    assert collapse_reason(log_of([2.0] * 12, 0.0, 1.0, every=1), 2, 640) is None, "no row before them"


def test_a_run_that_never_wakes_is_stopped_after_a_thousand_updates():
    assert collapse_reason(log_of([2.0] * 19), 2, 640) is None
    assert "each of the 2 groups uses one code" in collapse_reason(log_of([2.0] * 20), 2, 640)


# --- Loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_gives_every_rank_the_masked_frames_of_the_whole_update(prepared, processes):
    """The denominator of the loss, without a word between the ranks; three utterances of 13 are left for the last."""
    model = tiny({"model_type": "wav2vec2", **LAYER}).model
    dataset = ShardDataset(prepared / "train")
    plan = BatchPlan(np.arange(13), dataset.num_samples, 5, seed=5)
    of_set = PretrainingCollator(True, model.hf.config, MASKS, seed=5)
    shares = [
        list(training_loader(dataset, plan, None, of_set, CutSettings(rank, processes, 2), 0, 6, num_workers=0))
        for rank in range(processes)
    ]
    for updates in zip(*shares, strict=True):
        found = sum(batch.num_masked for update in updates for batch in update.micro_batches)
        assert {update.num_labels for update in updates} == {found} and found > 0
        assert len({update.num_utterances for update in updates}) == 1
        rows = np.concatenate([batch.rows for update in updates for batch in update.micro_batches])
        assert len(rows) == len(set(rows)) == updates[0].num_utterances
    assert [update.num_utterances for update in shares[0]] == [5, 5, 3, 5, 5, 3]


def test_loading_processes_change_nothing(prepared):
    model = tiny({"model_type": "wav2vec2", **LAYER}).model
    dataset = ShardDataset(prepared / "train")
    plan = BatchPlan(np.arange(13), dataset.num_samples, 5, seed=5)
    of_set = PretrainingCollator(True, model.hf.config, MASKS, seed=5)
    alone, by_worker = (
        list(training_loader(dataset, plan, None, of_set, CutSettings(0, 1, 5), 0, 3, num_workers=count))
        for count in (0, 1)
    )
    for one, other in zip(alone, by_worker, strict=True):
        (batch,), (same) = one.micro_batches, other.micro_batches[0]
        assert torch.equal(batch.input_values_BS, same.input_values_BS)
        assert torch.equal(batch.distractors_BMK, same.distractors_BMK)
        assert batch.gumbel_seeds == same.gumbel_seeds


def test_evaluation_hears_every_row_once_with_masks_that_stay(prepared):
    model = tiny({"model_type": "wav2vec2", **LAYER}).model.eval()
    dataset, sums = ShardDataset(prepared / "dev"), []
    for seed, size, processes in ((5, 5, 1), (6, 1, 1), (7, 2, 2)):
        of_set = PretrainingCollator(True, model.hf.config, MASKS, seed)
        batches = [
            batch
            for rank in range(processes)
            for batch in evaluation_loader(dataset, np.arange(5), of_set, CutSettings(rank, processes, size), 0)
        ]
        assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(5))
        with torch.no_grad():
            parts = [pretraining_losses(model, batch)[2] for batch in batches]
        sums.append([float(sum(getattr(one, name).sum() for one in parts)) for name in ("contrastive_B", "masked_B")])
    assert sums[1] == pytest.approx(sums[0], rel=1e-5) and sums[2] == pytest.approx(sums[0], rel=1e-5)


# --- Passes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", FAMILIES)
def test_a_padded_pass_of_pretraining_asks_the_device_nothing(fields, checkpointing):
    model = tiny(fields, gradient_checkpointing=checkpointing).model.train()
    batch = collate(model, range(6))
    num_masked = batch.num_masked
    with Questions() as asked:
        marginal = model.code_prob_sum(batch) / num_masked
        pretraining_losses(model, batch, marginal, TEMPERATURE)[1].sum().backward()
        pretraining_losses(model, batch, None, TEMPERATURE)[1].sum().backward()
    assert asked.asked == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", FAMILIES)
def test_half_precision_changes_the_layers_and_not_the_objective(fields, dtype):
    """The pre-pass and the pass see the same features, losses are fp32, gradients finite and those of fp32."""
    model = tiny(fields).model.train()
    batch = collate(model, range(6))

    def gradient(enabled: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=enabled):
            marginal = model.code_prob_sum(batch) / batch.num_masked
            loss, objective, statistics = pretraining_losses(model, batch, marginal, TEMPERATURE)
        sums = statistics.code_prob_sum_BGV.sum(0)
        torch.testing.assert_close(sums / batch.num_masked, marginal, rtol=1e-5, atol=1e-7)
        assert {loss.dtype, objective.dtype, statistics.contrastive_B.dtype} == {torch.float32}
        objective.sum().backward()
        return torch.cat([one.flatten() for one in gradients(model).values()])

    precise, rounded = gradient(False), gradient(True)
    assert rounded.isfinite().all()
    cosine = F.cosine_similarity(precise, rounded, dim=0)
    assert cosine > 0.9, "a code in fifty may fall to the other side"


def test_a_batch_without_a_masked_frame_passes_and_adds_nothing():
    """A rank may get nothing but clips that are too short; its gradients are zeros, and nobody waits for them."""
    model = tiny({"model_type": "wav2vec2", **GROUP}).model.train()
    batch = collate(model, [4, 5])
    assert batch.num_masked == 0
    assert not model.code_prob_sum(batch).any()
    for marginal in (None, torch.full((2, 12), 1 / 12)):
        loss, objective, statistics = pretraining_losses(model, batch, marginal, TEMPERATURE)
        assert loss.tolist() == [0.0, 0.0] and statistics.masked_B.tolist() == [0.0, 0.0]
        objective.sum().backward()
        found = gradients(model)
        assert found.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
        assert not any(one.any() for one in found.values())
    (batch,) = collate(model, [5]).split(10**9)  # shorter than the first convolution
    with torch.no_grad():
        assert pretraining_losses(model.eval(), batch)[0].tolist() == [0.0]


@pytest.mark.parametrize("fields", FAMILIES)
def test_pretraining_learns(fields):
    """One batch, 60 updates: the accuracy leaves chance (1 of 8), and more codes than one per group are in use."""
    model = tiny(fields).model.train()
    batch = collate(model, range(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        loss, objective, statistics = pretraining_losses(model, batch, None, TEMPERATURE)
        first = float(loss.detach().sum()) if first is None else first
        optimizer.zero_grad()
        (objective.sum() / batch.num_masked).backward()
        optimizer.step()
    assert float(loss.detach().sum()) < 0.8 * first
    assert float(statistics.correct_B.sum()) / batch.num_masked > 0.25
    assert float(perplexity(statistics.code_prob_sum_BGV.sum(0) / batch.num_masked)) > 4
