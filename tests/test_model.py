"""model.py against transformers, and against itself with other neighbours."""

import fnmatch
import functools
import json
import pathlib
import pickle
import shutil
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import LARGE_960H, XLS_R_300M, shrink, write_published_like_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CTC_MAPPING, Wav2Vec2Config, Wav2Vec2ForCTC, pipeline
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

import model
from errors import UsageError
from metrics import greedy_decode
from model import (
    CTCModel,
    LoadedModel,
    ValidGroupNorm,
    ctc_loss_sum,
    draw_masks,
    load_model,
    num_frames,
    optimizer_groups,
    parameter_counts,
    save_model,
)
from text import LARGE_960H_VOCABULARY

# WavLM's own call of torch's attention; model.py silences it outside of pytest, which resets the filters.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STILL = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop"),
    0.0,
)
GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
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


@dataclass(frozen=True)
class Settings:
    """The fields of TrainConfig that load_model reads."""

    model_name_or_path: str | None = None
    model_config: dict[str, Any] | None = None
    model_overrides: dict[str, Any] | None = None
    vocabulary: str = "auto"
    characters_to_ignore: str = ",.?"
    case: str = "auto"
    freeze_feature_encoder: bool = False
    gradient_checkpointing: bool = False
    seed: int = 7


def texts() -> list[str]:
    return ["Ƙofar gida,", "ɗan uwa. Ƴa"]


def no_texts() -> list[str]:
    raise AssertionError("the training text is not needed")


def tiny(fields: dict[str, Any], **settings: Any) -> LoadedModel:
    settings.setdefault("vocabulary", "large_960h")
    loaded = load_model(Settings(model_config={**TINY, **STILL, **fields}, **settings), no_texts)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # As after pre-training: it shifts zeros.
            module.running_mean.fill_(0.5)
    return loaded


def plain_transformers(ours: CTCModel) -> torch.nn.Module:
    """The same weights in a model of transformers that this project never touched."""
    theirs = MODEL_FOR_CTC_MAPPING[type(ours.hf.config)](ours.hf.config)
    theirs.load_state_dict(ours.hf.state_dict())
    return theirs.to(next(ours.parameters()).dtype).train(ours.training)


def waves(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, generator=generator).to(dtype) for length in lengths]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# --- Promise 2: one utterance, one result --------------------------------------------------------------------------


@pytest.mark.parametrize("fields", FAMILIES)
def test_alone_gives_exactly_what_transformers_gives(fields):
    ours = tiny(fields).model.eval()
    theirs = plain_transformers(ours)
    with torch.no_grad():
        for wave in waves()[:4]:
            logits, frames = ours(wave[None], [len(wave)])
            assert torch.equal(logits, theirs(wave[None]).logits)
            assert torch.equal(logits, theirs(wave[None], attention_mask=torch.ones(1, len(wave)).long()).logits)
            assert frames.tolist() == [logits.shape[1]]


@pytest.mark.parametrize("fields", FAMILIES)
def test_padding_and_neighbours_change_nothing(fields):
    ours = tiny(fields).model.eval()
    rows = waves()
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


# --- Saving and loading --------------------------------------------------------------------------------------------


def test_saved_model_is_transformers_own(tmp_path):
    loaded = tiny({"model_type": "wav2vec2", **GROUP})
    with torch.no_grad():  # A sharp head, so that the text is not all blanks.
        loaded.model.hf.lm_head.weight.mul_(50)
    save_model(loaded, tmp_path / "ours")
    plain_transformers(loaded.model).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    names = [name.removeprefix("hf.") for name, _ in loaded.model.named_parameters()]
    assert names == [name for name, _ in plain_transformers(loaded.model).named_parameters()]

    wave = waves([16000])[0]
    logits, frames = loaded.model.eval()(wave[None], [16000])
    again = load_model(Settings(model_name_or_path=str(tmp_path / "ours")), no_texts)
    assert again.head_fits
    assert torch.equal(again.model.eval()(wave[None], [16000])[0], logits)
    assert torch.equal(Wav2Vec2ForCTC.from_pretrained(tmp_path / "ours").eval()(wave[None]).logits, logits)

    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = {"vocab_size": 32, "pad_token_id": 0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    assert {name: config[name] for name in expected} == expected
    recogniser = pipeline("automatic-speech-recognition", model=str(tmp_path / "ours"), device="cpu")
    assert len(recogniser.tokenizer) == config["vocab_size"]
    normalised = loaded.processor.feature_extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    logits, frames = loaded.model(normalised, [16000])
    text = greedy_decode(logits, frames, loaded.vocabulary)[0]
    assert len(text) > 20
    assert recogniser({"raw": wave.numpy(), "sampling_rate": 16000})["text"] == text


@pytest.mark.parametrize("weight_norm", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_published_large_960h(tmp_path, file_format, weight_norm):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), file_format, weight_norm)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.notes == [
        "vocabulary: 32 tokens of the checkpoint's tokenizer",
        "weights: wav2vec2.masked_spec_embed drawn anew, not in the checkpoint",
    ]
    assert loaded.vocabulary.token_ids == LARGE_960H_VOCABULARY
    assert loaded.processor.feature_extractor.do_normalize
    assert weights_of(loaded).keys() >= file_weights(tmp_path).keys()
    assert all(torch.equal(weights_of(loaded)[key], value) for key, value in file_weights(tmp_path).items())


@pytest.mark.parametrize("weight_norm", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_published_xls_r(tmp_path, file_format, weight_norm):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), file_format, weight_norm)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), texts)
    assert not loaded.head_fits
    assert loaded.vocabulary.token_ids == {
        token: index for index, token in enumerate(["<pad>", "<unk>", "|", *"adfginoruwƙƴɗ"])
    }
    assert loaded.notes == [
        "vocabulary: 16 tokens built from the training text, for the checkpoint has no tokenizer",
        "head: new, 16 outputs; there was none",
        "weights: wav2vec2.masked_spec_embed drawn anew, not in the checkpoint",
        "weights: 7 of the checkpoint not used (project_hid, project_q, quantizer)",
    ]
    assert loaded.model.hf.lm_head.out_features == len(loaded.processor.tokenizer) == 16
    assert loaded.processor.feature_extractor.return_attention_mask
    unused = ("quantizer", "project_")
    kept = {key: value for key, value in file_weights(tmp_path).items() if not key.startswith(unused)}
    assert all(torch.equal(weights_of(loaded)[key], value) for key, value in kept.items())


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return loaded.model.hf.state_dict()


def file_weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    tensors = load_file(path) if path.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {functools.reduce(lambda k, old: k.replace(old, new[old]), new, key): v for key, v in tensors.items()}


def test_new_head_depends_on_the_seed_alone(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), "safetensors")

    def drawn(seed: int, global_seed: int) -> list[torch.Tensor]:
        torch.manual_seed(global_seed)
        loaded = load_model(Settings(model_name_or_path=str(tmp_path), seed=seed), texts)
        return [loaded.model.hf.lm_head.weight, loaded.model.hf.wav2vec2.masked_spec_embed]

    torch.manual_seed(5)
    expected_next = torch.rand(1)
    first, again, other = drawn(1, 5), drawn(1, 6), drawn(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.rand(1), expected_next)  # Loading left the global generator where it was.
    assert abs(first[0].std().item() - 0.02) < 0.004


def test_random_weights_depend_on_the_seed_alone():
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        return weights_of(tiny({"model_type": "wav2vec2"}, seed=seed))

    first = drawn(1)
    torch.rand(3)
    assert all(torch.equal(value, drawn(1)[key]) for key, value in first.items())
    assert not torch.equal(first["lm_head.weight"], drawn(2)["lm_head.weight"])


@pytest.mark.parametrize("vocabulary", ["train", "path"])
def test_head_is_replaced_when_the_vocabulary_differs(tmp_path, vocabulary):
    write_published_like_checkpoint(tmp_path / "model", shrink(LARGE_960H), "safetensors")
    if vocabulary == "path":  # The same size, other letters.
        swapped = {{"A": "B", "B": "A"}.get(token, token): index for token, index in LARGE_960H_VOCABULARY.items()}
        (tmp_path / "mine.json").write_text(json.dumps(swapped))
        vocabulary = str(tmp_path / "mine.json")
    loaded = load_model(Settings(model_name_or_path=str(tmp_path / "model"), vocabulary=vocabulary), texts)
    size = len(loaded.vocabulary)
    assert not loaded.head_fits
    assert f"head: new, {size} outputs; the checkpoint's 32 belong to another vocabulary" in loaded.notes
    assert loaded.model.hf.lm_head.out_features == loaded.model.hf.config.vocab_size == size
    assert not torch.equal(loaded.model.hf.lm_head.weight[:5], file_weights(tmp_path / "model")["lm_head.weight"][:5])


def test_checkpoint_of_another_blank(tmp_path):
    """Many community models have [PAD] last, and a tokenizer class that adds `<s>` and `</s>` (trap 19)."""
    labels = {"|": 0, "a": 1, "b": 2, "[UNK]": 3, "[PAD]": 4}
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"lm_head.weight": torch.rand(5, 32), "lm_head.bias": torch.rand(5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    files = {
        "config.json": shrink(LARGE_960H).config | {"vocab_size": 5, "pad_token_id": 0},
        "vocab.json": labels,
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | {"tokenizer_class": "Wav2Vec2CTCTokenizer"},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == labels
    assert loaded.vocabulary.blank_id == loaded.model.hf.config.pad_token_id == 4
    assert torch.equal(loaded.model.hf.lm_head.weight, tensors["lm_head.weight"])


def test_tokens_added_beside_the_vocabulary_file(tmp_path):
    """The layout of transformers 4's fine-tuning scripts: `<s>` and `</s>` in a file of their own, and in the head."""
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    labels = {token: index for token, index in LARGE_960H_VOCABULARY.items() if token not in ("<s>", "</s>")}
    labels = {token: index for index, token in enumerate(labels)}
    (tmp_path / "vocab.json").write_text(json.dumps(labels))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 30, "</s>": 31}))
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == labels | {"<s>": 30, "</s>": 31}


def test_nested_vocabulary(tmp_path):
    """MMS: one vocabulary per language in one file."""
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    (tmp_path / "vocab.json").write_text(json.dumps({"hau": {"<pad>": 0}, "eng": LARGE_960H_VOCABULARY}))
    edit(tmp_path, "tokenizer_config.json", target_lang="eng")
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == LARGE_960H_VOCABULARY
    save_model(loaded, tmp_path / "saved")
    assert load_model(Settings(model_name_or_path=str(tmp_path / "saved")), no_texts).head_fits


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm"])
def test_encoder_published_without_a_head_class(tmp_path, family):
    """hubert-base-ls960 and wavlm-base hold the bare encoder, whose keys lack the family's prefix."""
    bare = tiny({"model_type": family, **GROUP}).model.hf.base_model
    save_file(bare.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    bare.config.save_pretrained(tmp_path)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), texts)
    assert all(
        torch.equal(loaded.model.hf.base_model.state_dict()[key], value) for key, value in bare.state_dict().items()
    )
    assert loaded.notes[1:] == [
        "head: new, 16 outputs; there was none",
        "feature extractor: the checkpoint has none; waveforms get zero mean and unit variance",
    ]


def test_half_precision_files_become_fp32(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    tensors = {key: value.half() for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_overrides_reach_the_model(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    overrides = {"attention_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0}
    loaded = load_model(Settings(model_name_or_path=str(tmp_path), model_overrides=overrides), no_texts)
    assert loaded.model.hf.wav2vec2.encoder.layers[0].attention.dropout == 0.0
    assert not loaded.model.masks_time
    assert not any("masked_spec_embed" in name for name, _ in loaded.model.named_parameters())


def test_mask_embedding_of_a_checkpoint_may_go_unused(tmp_path):
    save_model(tiny({"model_type": "wav2vec2", "mask_time_prob": 0.1}), tmp_path)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path), model_overrides={"mask_time_prob": 0}), no_texts)
    assert "weights: 1 of the checkpoint not used (wav2vec2)" in loaded.notes


def test_nothing_of_transformers_reaches_the_screen(tmp_path, capfd):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), "bin")
    verbosity = model.transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(load_model(Settings(model_name_or_path=str(tmp_path)), texts), tmp_path / "saved")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert model.transformers_logging.get_verbosity() == verbosity
    assert model.transformers_logging.is_progress_bar_enabled()


# --- Bad input -----------------------------------------------------------------------------------------------------


def edit(folder: pathlib.Path, name: str, **fields: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def tensors(folder: pathlib.Path, change: Any) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "wav2vec2.encoder.layers.0.layer_norm.weight"
BAD_CHECKPOINTS = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{nope"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "a mapping is needed"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
    "config of wrong types": (lambda f: edit(f, "config.json", hidden_size="wide"), "is not a wav2vec2 configuration"),
    "unequal convolutions": (lambda f: edit(f, "config.json", conv_stride=[5, 2]), "conv"),
    "unknown family": (lambda f: edit(f, "config.json", model_type="nonsense"), "model_type is 'nonsense'"),
    "no family": (lambda f: (f / "config.json").write_text("{}"), "model_type is None"),
    "Whisper": (lambda f: edit(f, "config.json", model_type="whisper"), "model_type is 'whisper'"),
    "Wav2Vec2-BERT": (lambda f: edit(f, "config.json", model_type="wav2vec2-bert"), "model_type is 'wav2vec2-bert'"),
    "adapter": (lambda f: edit(f, "config.json", add_adapter=True), "add_adapter"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "cannot be read as weights",
    ),
    "weights of zeros": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62)),
        "cannot be read as weights",
    ),
    "a key missing": (lambda f: tensors(f, lambda t: t.pop(NORM)), f"missing: {NORM}"),
    "a key too many": (
        lambda f: tensors(f, lambda t: t.update({"classifier.weight": torch.ones(2)})),
        "unexpected: classifier.weight",
    ),
    "another shape": (lambda f: tensors(f, lambda t: t.update({NORM: torch.ones(5)})), f"shape of {NORM}"),
    "vocabulary not a mapping": (lambda f: (f / "vocab.json").write_text("[1]"), "vocab.json holds a list"),
    "vocabulary with a gap": (lambda f: edit(f, "vocab.json", Z=40), "31 is missing"),
    "a tokenizer of phonemes": (
        lambda f: edit(f, "tokenizer_config.json", tokenizer_class="Wav2Vec2PhonemeCTCTokenizer"),
        "Wav2Vec2PhonemeCTCTokenizer",
    ),
    "attention from the Hub": (
        lambda f: edit(f, "config.json", attn_implementation="somebody/kernel"),
        "names code to download ('somebody/kernel')",
    ),
    "quantized": (lambda f: edit(f, "config.json", quantization_config={"quant_method": "gptq"}), "is quantized"),
    "another rate": (lambda f: edit(f, "preprocessor_config.json", sampling_rate=8000), "hears 8000 Hz"),
    "features, not waveforms": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        "feature extractor cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused_in_one_line(tmp_path, case):
    spoil, message = BAD_CHECKPOINTS[case]
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    spoil(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(tmp_path)), texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_VOCABULARIES = [
    ("[1, 2]", "holds a list, a mapping is needed"),
    ("not json", "is not JSON"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 3}', "'a' and 'b' share the id 3"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 4}', "3 is missing"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": "3"}', "the id of 'a' is '3'"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": true}', "the id of 'a' is True"),
    ('{"<unk>": 0, "|": 1, "a": 2}', "<pad>"),
]


@pytest.mark.parametrize(("content", "message"), BAD_VOCABULARIES)
def test_bad_vocabulary_file_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message.replace("|", r"\|")):
        tiny({"model_type": "wav2vec2"}, vocabulary=str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name_or_path": "/no/such/folder"}, "there is no such folder"),
        ({"model_name_or_path": "./model"}, "there is no such folder"),
        ({"model_name_or_path": __file__}, "is a file"),
        ({"model_name_or_path": "two words/x"}, "neither a folder nor a name"),
        ({"model_config": {"model_type": "whisper"}}, "model_type is 'whisper'"),
        (
            {"model_config": {"model_type": "wav2vec2", "hiden_size": 3}},
            "unknown field hiden_size, nearest is hidden_size",
        ),
        ({"model_config": {"model_type": "wav2vec2", "vocab_size": 3}}, "vocab_size follows from the vocabulary"),
        ({"model_config": {"model_type": "wav2vec2", "hidden_size": 30, "num_attention_heads": 4}}, "does not make a"),
        ({"model_config": {"model_type": "wav2vec2", "hidden_size": "wide"}}, "hidden_size"),
        ({"model_config": {"model_type": "wav2vec2", "conv_dim": [4]}}, "same length"),
        ({"model_config": {"model_type": "wav2vec2"}, "vocabulary": "model"}, "no tokenizer"),
        ({"model_config": {"model_type": "wav2vec2"}, "vocabulary": "/no/vocab.json"}, "there is no such file"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UsageError) as caught:
        load_model(Settings(**settings), texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_names_the_download_command(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path="somebody/not-here"), no_texts)
    assert "hf download somebody/not-here --local-dir not-here" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_download_is_told_in_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionResetError("reset\nby peer")

    monkeypatch.setattr(model, "snapshot_download", fail)
    with pytest.raises(UsageError, match=r"the download of somebody/x failed .*reset by peer.* hf download somebody/x"):
        load_model(Settings(model_name_or_path="somebody/x"), no_texts)


@pytest.mark.parametrize(("file_format", "downloads"), [("safetensors", 1), ("bin", 2)])
def test_bin_is_downloaded_only_where_there_is_no_safetensors(tmp_path, monkeypatch, file_format, downloads):
    write_published_like_checkpoint(tmp_path / "hub", shrink(LARGE_960H), file_format)
    (tmp_path / "disk").mkdir()
    asked = []

    def download(name: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        for path in (tmp_path / "hub").iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / "disk")
        return str(tmp_path / "disk")

    monkeypatch.setattr(model, "snapshot_download", download)
    assert load_model(Settings(model_name_or_path="facebook/wav2vec2-large-960h"), no_texts).head_fits
    assert [any("bin" in pattern for pattern in patterns) for patterns in asked] == [False, True][:downloads]


def test_poisoned_pickle_is_not_executed(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "bin")
    trap = tmp_path / "executed"

    class Poison:
        def __reduce__(self):
            return (pathlib.Path.touch, (trap,))

    for write in (
        lambda path: torch.save({"x": Poison()}, path),
        lambda path: path.write_bytes(pickle.dumps(Poison())),
    ):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(UsageError, match="cannot be read as weights"):
            load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert not trap.exists()


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    trap = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(trap)!r}).touch()")
    remote = {
        "AutoConfig": "evil.C",
        "AutoModelForCTC": "evil.M",
        "AutoTokenizer": "evil.T",
        "AutoFeatureExtractor": "evil.F",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(tmp_path, name, auto_map=remote)
    load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert not trap.exists()


def test_every_family_is_one_of_transformers():
    assert all(CONFIG_MAPPING[family] in MODEL_FOR_CTC_MAPPING for family in model.FAMILIES)
    norms = [m for m in tiny({"model_type": "wav2vec2", **GROUP}).model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [type(norm) for norm in norms] == [ValidGroupNorm]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("architecture", [LARGE_960H, XLS_R_300M], ids=lambda a: a.name)
def test_real_architectures(tmp_path, architecture, file_format):
    write_published_like_checkpoint(tmp_path, architecture, file_format)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path), freeze_feature_encoder=True), texts)
    assert loaded.head_fits != architecture.is_pretrained_only
    trained, frozen = parameter_counts(loaded.model)
    assert 310e6 < trained + frozen < 320e6
    ours, rows = loaded.model.eval(), waves([16000, 9000])
    with torch.no_grad():
        together, frames = ours(pad(rows), [16000, 9000])
        alone, _ = ours(rows[1][None], [9000])
        theirs = plain_transformers(ours)(rows[1][None]).logits
    assert torch.equal(alone, theirs)
    torch.testing.assert_close(together[1, : frames[1]], alone[0], atol=1e-4, rtol=0)
