"""model.py against transformers, and against itself with other neighbours."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import GROUP, LAYER, TINY, pad, plain_transformers, tiny, waves
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from data import Batch
from model import (
    CTCModel,
    Objective,
    ValidGroupNorm,
    consistency_sum,
    ctc_loss_sum,
    draw_masks,
    forward_with_loss,
    num_frames,
    optimizer_groups,
    parameter_counts,
    smoothing_sum,
)

# WavLM's own call of torch's attention; model.py silences it outside of pytest, which resets the filters.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

FAMILIES = [
    pytest.param({"model_type": family, **norm}, id=f"{family}-{norm['feat_extract_norm']}")
    for family in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
    for norm in (GROUP, LAYER)
] + [
    pytest.param(
        {"model_type": "data2vec-audio", "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}, id="data2vec"
    ),
    pytest.param(
        {"model_type": "wav2vec2-conformer", "feat_extract_norm": "group", "conformer_conv_dropout": 0.0},
        id="conformer-group",
    ),
]
FAMILIES.append(pytest.param({"model_type": "hubert", **GROUP, "conv_pos_batch_norm": True}, id="hubert-batch-norm"))
THREE_FAMILIES = FAMILIES[:6]
# One row without padding, some shorter, one of a single frame, and one too short for any frame.
LENGTHS = [1600, 933, 1200, 40, 12]


# --- Promise 2: one utterance, one result --------------------------------------------------------------------------


@pytest.mark.parametrize("fields", FAMILIES)
def test_alone_gives_exactly_what_transformers_gives(fields):
    ours = tiny(fields).model.eval()
    theirs = plain_transformers(ours)
    with torch.no_grad():
        for wave in waves(LENGTHS)[:4]:
            logits, frames = ours(wave[None], [len(wave)])
            assert torch.equal(logits, theirs(wave[None]).logits)
            assert torch.equal(logits, theirs(wave[None], attention_mask=torch.ones(1, len(wave)).long()).logits)
            assert frames.tolist() == [logits.shape[1]]


@pytest.mark.parametrize("fields", FAMILIES)
def test_padding_and_neighbours_change_nothing(fields):
    ours = tiny(fields).model.eval()
    rows = waves(LENGTHS)
    with torch.no_grad():
        together, frames = ours(pad(rows), torch.tensor(LENGTHS))
        wider, _ = ours(F.pad(pad(rows), (0, 777)), LENGTHS)
        assert frames.tolist() == [79, 46, 59, 1, 0]
        for index, (wave, count) in enumerate(zip(rows, frames.tolist(), strict=True)):
            alone, _ = ours(wave[None], [len(wave)])
            torch.testing.assert_close(together[index, :count], alone[0, :count], atol=1e-5, rtol=0)
            torch.testing.assert_close(wider[index, :count], alone[0, :count], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [THREE_FAMILIES[0], THREE_FAMILIES[2], THREE_FAMILIES[4]])
def test_transformers_itself_does_depend_on_padding(fields):
    """Trap 22, so that the test above is known to test something."""
    ours = tiny(fields).model.eval()
    rows = waves([1600, 800])
    mask = pad([torch.ones(len(row)) for row in rows]).long()
    with torch.no_grad():
        theirs = plain_transformers(ours)(pad(rows), attention_mask=mask).logits
        alone, frames = ours(rows[1][None], [800])
    assert (theirs[1, : frames[0]] - alone[0]).abs().max() > 0.05


def test_batch_without_padding_takes_the_unchanged_path(monkeypatch):
    calls = []
    group_norm = torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda x, *rest: calls.append(tuple(x.shape)) or group_norm(x, *rest))
    ours = tiny({"model_type": "wav2vec2", **GROUP}).model.eval()
    ours(pad(waves([400, 400])), [400, 400])
    assert calls == [(2, 16, 79)]
    ours(pad(waves([400, 300])), [400, 300])
    assert calls[1:] == [(1, 16, 79), (1, 16, 59)]


def test_group_norm_is_replaced():
    norms = [m for m in tiny({"model_type": "wav2vec2", **GROUP}).model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [type(norm) for norm in norms] == [ValidGroupNorm]


# --- Promise 1: gradients ------------------------------------------------------------------------------------------


def masks_for(lengths: list[int], config: Any, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    counts = [num_frames(lengths[row], config.conv_kernel, config.conv_stride) for row in rows]
    drawn = [
        draw_masks(count, config.hidden_size, config, np.random.default_rng(row))
        for row, count in zip(rows, counts, strict=True)
    ]
    widest = num_frames(max(max(lengths[row] for row in rows), 60), config.conv_kernel, config.conv_stride)
    time = torch.stack([F.pad(torch.from_numpy(time), (0, widest - len(time))) for time, _ in drawn])
    return time, torch.stack([torch.from_numpy(feature) for _, feature in drawn])


def gradients(ours: CTCModel, lengths: list[int], cuts: list[range]) -> dict[str, torch.Tensor]:
    rows = waves(lengths, torch.float64)
    labels = [torch.tensor([5, 6, 7]), torch.tensor([8, 8]), torch.tensor([9]), torch.tensor([10, 11])]
    ours.zero_grad()
    for cut in cuts:
        time, feature = masks_for(lengths, ours.hf.config, cut)
        logits, frames = ours(pad([rows[row] for row in cut]), [lengths[row] for row in cut], time, feature)
        target = torch.cat([labels[row] for row in cut])
        counts = torch.tensor([len(labels[row]) for row in cut])
        # In double precision: the loss of the program is in fp32, which would hide small differences.
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        F.ctc_loss(log_probs, target, frames, counts, reduction="sum").backward()
    return {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", FAMILIES)
def test_gradient_is_the_sum_of_each_utterance_alone(fields, checkpointing):
    masked = {"mask_time_prob": 0.3, "mask_time_length": 3, "mask_feature_prob": 0.2, "mask_feature_length": 4}
    ours = tiny({**fields, **masked}).model
    ours.double().train()
    if checkpointing:
        ours.enable_gradient_checkpointing()
    lengths = [1600, 933, 1200, 300]
    together = gradients(ours, lengths, [range(4)])
    alone = gradients(ours, lengths, [range(row, row + 1) for row in range(4)])
    assert together.keys() == alone.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    for name in together:
        # transformers' positions and WavLM's buckets are fp32 inside.
        torch.testing.assert_close(
            together[name], alone[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_recomputation_keeps_the_lengths_of_its_own_batch():
    """Two forward passes before the first backward: the second batch must not lend its lengths to the first."""
    loaded = tiny({"model_type": "wav2vec2", **GROUP})
    ours = loaded.model.train()
    first, second = pad(waves([1600, 800])), pad(waves([1600, 1500]))

    def gradient() -> list[torch.Tensor]:
        ours.zero_grad()
        one, _ = ours(first, [1600, 800])
        two, _ = ours(second, [1600, 1500])
        (one.square().sum() + two.square().sum()).backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    plain = gradient()
    ours.enable_gradient_checkpointing()
    recomputed = gradient()
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", THREE_FAMILIES)
def test_autocast_keeps_statistics_and_loss_in_fp32(fields, dtype, monkeypatch):
    seen = []
    group_norm = torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda x, *rest: seen.append(x.dtype) or group_norm(x, *rest))
    ours = tiny(fields).model.train()
    with torch.autocast("cpu", dtype=dtype):
        logits, frames = ours(pad(waves([1600, 800])), [1600, 800])
        losses = ctc_loss_sum(logits, frames, torch.tensor([5, 6, 7]), torch.tensor([2, 1]), 0)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert set(seen) <= {torch.float32}
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh tensors hold NaN, so that a kernel which reads what it did not write shows it at once."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned(poisoned_memory):
    assert torch.empty(3).isnan().all()


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", FAMILIES)
def test_bf16_gradients_are_those_of_fp32_where_a_nan_could_come_from(fields, attention, poisoned_memory):
    """Trap 12: silence, a constant, one frame, and a row that attention sees as padding throughout."""
    ours = tiny(fields).model.train()
    if fields["model_type"] != "wavlm":  # It calls torch's attention itself.
        ours.hf.set_attn_implementation(attention)
    lengths = [*LENGTHS[:4], 5]  # Shorter than the first kernel.
    rows = waves(lengths)
    rows[1], rows[2] = torch.zeros(lengths[1]), torch.full((lengths[2],), 0.5)
    labels, label_lengths = torch.tensor([5, 6, 7, 8, 8, 9, 10, 11]), torch.tensor([3, 2, 2, 1, 0])

    def gradient(in_bf16: bool) -> torch.Tensor:
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            logits, frames = ours(pad(rows), lengths)
        ctc_loss_sum(logits, frames, labels, label_lengths, 0).sum().backward()
        return torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None])

    precise, rounded = gradient(in_bf16=False), gradient(in_bf16=True)
    assert precise.isfinite().all()
    assert rounded.isfinite().all()
    # Up to 0.11 was seen, for WavLM with group norm; most are below 0.05.
    assert (rounded - precise).norm() < 0.3 * precise.norm()


class Questions(TorchDispatchMode):
    """Counts the operations whose result Python, or the shape of a tensor, waits for; a GPU is idle meanwhile."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        indices = [one for entry in arguments if isinstance(entry, (list, tuple)) for one in entry]
        by_mask = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)
        name = operation.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or (name.startswith("index") and by_mask):
            self.asked.append(name)
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", FAMILIES)
def test_a_padded_pass_asks_the_device_nothing(fields, checkpointing):
    ours = tiny(fields, gradient_checkpointing=checkpointing).model.train()
    labels, counts = torch.tensor([5, 6, 7]), torch.tensor([2, 1])
    theirs = plain_transformers(ours)
    mask = pad([torch.ones(1600), torch.ones(800)]).long()
    rows = pad(waves([1600, 800]))
    with Questions() as of_ours:
        logits, frames = ours(rows, [1600, 800])
        ctc_loss_sum(logits, frames, labels, counts, 0).sum().backward()
    with Questions() as of_transformers:
        theirs(rows, attention_mask=mask).logits.sum().backward()
    assert of_ours.asked == []
    assert of_transformers.asked != []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", FAMILIES[1:10:2])  # Layer norm, and nothing else that reads the padding.
def test_padding_masks_are_those_of_transformers(fields, attention):
    ours = tiny(fields).model.eval()
    if fields["model_type"] != "wavlm":
        ours.hf.set_attn_implementation(attention)
    theirs = plain_transformers(ours)
    assert theirs.config._attn_implementation == ours.hf.config._attn_implementation
    rows, mask = pad(waves([1600, 933])), pad([torch.ones(1600), torch.ones(933)]).long()
    with torch.no_grad():
        logits, frames = ours(rows, [1600, 933])
        expected = theirs(rows, attention_mask=mask).logits
    for index, count in enumerate(frames.tolist()):
        torch.testing.assert_close(logits[index, :count], expected[index, :count], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_feature_encoder_builds_no_graph(checkpointing):
    loaded = tiny({"model_type": "hubert", **GROUP}, freeze_feature_encoder=True, gradient_checkpointing=checkpointing)
    ours, graphs = loaded.model.train(), []
    encoder = ours.hf.hubert.feature_extractor
    encoder.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    logits, _ = ours(pad(waves([1600, 800])), [1600, 800])
    logits.sum().backward()
    assert graphs == [False]
    assert all(p.grad is None for p in encoder.parameters())
    trained, frozen = parameter_counts(ours)
    assert frozen == sum(p.numel() for p in encoder.parameters())
    assert trained + frozen == sum(p.numel() for p in ours.parameters())


def test_waveform_gets_no_gradient():
    ours = tiny({"model_type": "wav2vec2", **GROUP}).model.train()
    wants = []
    ours.hf.wav2vec2.feature_extractor.conv_layers[0].register_forward_pre_hook(
        lambda module, inputs: wants.append(inputs[0].requires_grad)
    )
    ours(pad(waves([400])), [400])
    assert wants == [False]


def test_batch_norm_keeps_its_statistics_in_training():
    ours = tiny({"model_type": "hubert", **GROUP, "conv_pos_batch_norm": True}).model.train()
    norm = ours.hf.hubert.encoder.pos_conv_embed.batch_norm
    before = norm.running_mean.clone()
    ours(pad(waves([1600, 800])), [1600, 800])
    assert torch.equal(norm.running_mean, before)


# --- Masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [9, 10, 14, 37, 250, 749])
@pytest.mark.parametrize(("probability", "minimum"), [(0.05, 2), (0.075, 0), (0.4, 2)])
def test_masked_share_is_that_of_transformers(frames, probability, minimum):
    config = Wav2Vec2Config(
        mask_time_prob=probability, mask_time_length=10, mask_time_min_masks=minimum, mask_feature_prob=0.1
    )
    rng = np.random.default_rng(1)
    ours = np.array([draw_masks(frames, 64, config, rng)[0] for _ in range(2000)])
    if frames < 10:
        assert not ours.any()
        return
    state = np.random.get_state()
    np.random.seed(1)
    theirs = np.concatenate(
        [_compute_mask_indices((1, frames), probability, 10, min_masks=minimum) for _ in range(2000)]
    )
    np.random.set_state(state)
    # Standard error of the mean share over 2000 draws is below 0.008 in the worst of these cases.
    assert abs(ours.mean() - theirs.mean()) < 0.025
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.08
    assert abs(ours.any(1).mean() - theirs.any(1).mean()) < 0.05


def test_masks_are_a_function_of_the_generator_alone():
    config = Wav2Vec2Config(mask_time_prob=0.3, mask_feature_prob=0.3)
    before = np.random.get_state()[1].copy()
    first = draw_masks(200, 64, config, np.random.default_rng([42, 0, 3]))
    again = draw_masks(200, 64, config, np.random.default_rng([42, 0, 3]))
    other = draw_masks(200, 64, config, np.random.default_rng([42, 1, 3]))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (200,) and first[1].shape == (64,) and first[1].any()
    assert np.array_equal(before, np.random.get_state()[1])


def test_no_masks_without_augmentation():
    config = Wav2Vec2Config(apply_spec_augment=False, mask_time_prob=0.5, mask_feature_prob=0.5)
    time, feature = draw_masks(200, 64, config, np.random.default_rng(0))
    assert not time.any() and not feature.any()


def test_masks_do_what_transformers_does_with_them():
    ours = tiny({"model_type": "wav2vec2", **LAYER, "mask_time_prob": 0.3}).model.train()
    theirs = plain_transformers(ours)
    wave, mask = waves([1600])[0][None], torch.zeros(1, 79, dtype=torch.bool)
    mask[0, 10:20] = True
    logits, _ = ours(wave, [1600], mask)
    assert torch.equal(logits, theirs(wave, mask_time_indices=mask).logits)
    assert not torch.equal(logits, ours(wave, [1600])[0])
    ours.eval()
    assert torch.equal(ours(wave, [1600], mask)[0], ours(wave, [1600])[0])


def test_training_leaves_numpys_global_state_alone():
    ours = tiny({"model_type": "hubert", **GROUP, "mask_time_prob": 0.5, "mask_feature_prob": 0.5}).model.train()
    before = np.random.get_state()[1].copy()
    first, _ = ours(pad(waves([1600])), [1600])
    assert np.array_equal(before, np.random.get_state()[1])
    assert torch.equal(first, ours(pad(waves([1600])), [1600])[0])


def test_mask_embedding_is_trained_only_with_time_masks():
    with_time = tiny({"model_type": "wav2vec2", "mask_time_prob": 0.1}).model.train()
    features_only = tiny({"model_type": "wav2vec2", "mask_time_prob": 0.0, "mask_feature_prob": 0.1}).model
    assert with_time.hf.wav2vec2.masked_spec_embed.requires_grad
    assert not features_only.hf.wav2vec2.masked_spec_embed.requires_grad
    # Without a mask in this batch it still takes part, so that ranks do not wait for its gradient.
    with_time(pad(waves([400])), [400])[0].sum().backward()
    assert torch.equal(with_time.hf.wav2vec2.masked_spec_embed.grad, torch.zeros(32))


# --- Frames and loss -----------------------------------------------------------------------------------------------


def test_frame_lengths_are_those_of_transformers():
    config = Wav2Vec2Config()
    hf = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            **{**TINY, "conv_kernel": config.conv_kernel, "conv_stride": config.conv_stride}
            | {"conv_dim": [4] * 7, "num_feat_extract_layers": 7}
        )
    )
    samples = np.concatenate([np.arange(400, 2000), np.random.default_rng(0).integers(400, 10**6, 500)])
    expected = hf._get_feat_extract_output_lengths(torch.from_numpy(samples))
    for kind in (samples, samples.astype(np.int32), torch.from_numpy(samples)):
        assert num_frames(kind, config.conv_kernel, config.conv_stride).tolist() == expected.tolist()
    assert [num_frames(int(n), config.conv_kernel, config.conv_stride) for n in samples] == expected.tolist()


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16000, 49)])
def test_frames_of_wav2vec2(samples, frames):
    config = Wav2Vec2Config()
    assert num_frames(samples, config.conv_kernel, config.conv_stride) == frames
    assert num_frames(torch.tensor([samples]), config.conv_kernel, config.conv_stride).tolist() == [frames]


def test_loss_is_that_of_transformers_and_of_each_row_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 12, generator=generator)
    frames, counts = torch.tensor([20, 11, 7]), torch.tensor([4, 0, 3])
    labels = torch.tensor([1, 2, 2, 3, 9, 8, 7])
    losses = ctc_loss_sum(logits, frames, labels, counts, blank_id=0)
    for row, own in enumerate([[1, 2, 2, 3], [], [9, 8, 7]]):
        alone = F.ctc_loss(
            logits[row, : frames[row]].log_softmax(-1)[:, None],
            torch.tensor([own]),
            [frames[row]],
            [len(own)],
            reduction="sum",
        )
        torch.testing.assert_close(losses[row], alone)
    ours = tiny({"model_type": "wav2vec2", **LAYER}).model.eval()
    ours.hf.config.ctc_loss_reduction = "sum"
    wave, targets = pad(waves([1600, 900])), torch.tensor([[5, 6, 7], [8, 9, -100]])
    mask = pad([torch.ones(1600), torch.ones(900)]).long()
    theirs = plain_transformers(ours)(wave, attention_mask=mask, labels=targets).loss
    logits, frames = ours(wave, [1600, 900])
    mine = ctc_loss_sum(logits, frames, torch.tensor([5, 6, 7, 8, 9]), torch.tensor([3, 2]), 0).sum()
    torch.testing.assert_close(mine, theirs)


def test_more_labels_than_frames_give_zero_and_no_gradient():
    """Trap 17: 8 equal labels need 15 frames."""
    logits = torch.randn(1, 12, 5, requires_grad=True)
    loss = ctc_loss_sum(logits, torch.tensor([12]), torch.full((8,), 3), torch.tensor([8]), 0)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert not logits.grad.any()


def test_smoothing_is_the_divergence_from_the_uniform_distribution():
    """Against torch's own divergence of two distributions, frame by frame; frames behind the end do not count."""
    logits, lengths = 3 * torch.randn(3, 9, 7, dtype=torch.float64), [9, 4, 0]
    uniform = torch.distributions.Categorical(logits=torch.zeros(7, dtype=torch.float64))
    for row, (found, length) in enumerate(zip(smoothing_sum(logits, torch.tensor(lengths)), lengths, strict=True)):
        frames = [torch.distributions.Categorical(logits=frame) for frame in logits[row, :length]]
        expected = sum((torch.distributions.kl_divergence(one, uniform) for one in frames), torch.zeros(()))
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_consistency_is_the_symmetric_divergence_with_targets_that_stand_still():
    """Value, and gradient: of KL(target || view) it is view less target, half of it for each."""
    one, other = (3 * torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(2))
    one.requires_grad_()
    found = consistency_sum(one, other, torch.tensor([6, 2]))
    for row, length in enumerate([6, 2]):
        expected = 0.0
        for a, b in zip(one[row, :length].detach(), other[row, :length], strict=True):
            pair = [torch.distributions.Categorical(logits=side) for side in (a, b)]
            expected += 0.5 * float(
                torch.distributions.kl_divergence(*pair) + torch.distributions.kl_divergence(*reversed(pair))
            )
        assert float(found[row].detach()) == pytest.approx(expected, rel=1e-5)
    found.sum().backward()
    difference = 0.5 * (one.detach().softmax(-1) - other.softmax(-1))
    difference[1, 2:] = 0
    torch.testing.assert_close(one.grad, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", FAMILIES)
def test_two_views_are_two_passes_with_their_own_masks(fields: dict[str, Any]):
    """For every family: the shared convolutions change nothing, and rows are the first view's, then the second's."""
    ours = tiny({**fields, "mask_time_prob": 0.3, "mask_feature_prob": 0.3}).model.train()
    rows, lengths = waves([1600, 900]), [1600, 900]
    generator = torch.Generator().manual_seed(1)
    time = torch.rand(4, 79, generator=generator) < 0.3
    features = torch.rand(4, 32, generator=generator) < 0.2
    both, frames = ours(pad(rows), lengths, time, features, num_views=2)
    for view, masks in enumerate(((time[:2], features[:2]), (time[2:], features[2:]))):
        alone, _ = ours(pad(rows), lengths, *masks)
        for row, length in enumerate(frames.tolist()):
            torch.testing.assert_close(both[2 * view + row, :length], alone[row, :length], rtol=1e-4, atol=1e-5)


def test_objective_is_what_its_formula_says():
    """(1 - smoothing) x CTC + smoothing x divergence, both means over the views, + weight x consistency."""
    ours = tiny({"model_type": "wav2vec2", **LAYER, "mask_time_prob": 0.3}).model.train()
    masks = torch.zeros(2, 1, 79, dtype=torch.bool)
    masks[0, 0, 10:30], masks[1, 0, 40:60] = True, True
    batch = Batch(
        ["a"], np.zeros(1, int), [""], [""], waves([1600])[0][None], torch.tensor([1600]), torch.tensor([79]),
        torch.tensor([5, 6, 7]), torch.tensor([3]), masks[0], None, 2, masks[1], None,
    )  # fmt: skip
    logits, frames, loss = forward_with_loss(ours, batch, 0)
    views = [ours(batch.input_values_BS, [1600], mask)[0] for mask in masks]
    losses = [ctc_loss_sum(view, frames, batch.labels_L, batch.label_lengths_B, 0) for view in views]
    torch.testing.assert_close(loss, (losses[0] + losses[1]) / 2)
    smoothing = (smoothing_sum(views[0], frames) + smoothing_sum(views[1], frames)) / 2
    expected = 0.9 * loss + 0.1 * smoothing + 0.3 * consistency_sum(*views, frames)
    torch.testing.assert_close(Objective(0.1, 0.3).of(logits, frames, loss), expected)
    one_view, frames, loss = forward_with_loss(ours, replace(batch, num_views=1), 0)
    assert Objective().of(one_view, frames, loss) is loss, "without levers the loss itself"


def test_no_decay_on_biases_norms_and_gains():
    ours = tiny({"model_type": "wavlm", **GROUP}, freeze_feature_encoder=True).model
    decayed, free = optimizer_groups(ours, 0.01)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    kept = {names[id(p)].split("hf.wavlm.")[-1] for p in decayed["params"]}
    assert "encoder.pos_conv_embed.conv.parametrizations.weight.original1" in kept
    assert all("norm" not in name and not name.endswith(("bias", "original0", "rel_pos_const")) for name in kept)
    everything = decayed["params"] + free["params"]
    assert sorted(map(id, everything)) == sorted(id(p) for p in ours.parameters() if p.requires_grad)
