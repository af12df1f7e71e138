"""The acoustic model: frame lengths, SpecAugment's masks, the CTC loss, and a model of transformers made exact.

Dimensions: B utterances, S samples, T frames, V vocabulary, L labels, H hidden size, C channels of a convolution.

An utterance must give the same logits in every batch (promises 1 and 2). Three things in transformers break that, and
are mended here without changing a parameter name, so that checkpoints stay transformers' own: group norm takes its
statistics over the padding too, convolutions over time read what lies behind the end of a shorter row, and SpecAugment
masks come from numpy's global state.
"""

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from data import Batch

# WavLM's own call of torch's attention mixes mask types, at every forward pass.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")

Lengths = TypeVar("Lengths", int, np.ndarray, Tensor)

# Convolutions over time whose input is no longer zero in the padding, by the class that holds them.
CONVOLUTIONS_BEHIND_PADDING = {
    "Data2VecAudioPositionalConvLayer": "conv",
    "HubertPositionalConvEmbedding": "conv",  # Only with conv_pos_batch_norm; its shift fills the padding.
    "Wav2Vec2ConformerConvolutionModule": "depthwise_conv",
}
# Gains that are stored with more than one dimension, and still are no matrices to decay.
GAIN_NAMES = ("weight.original0", "weight_g", "gru_rel_pos_const")


# --- Frames, masks, loss -------------------------------------------------------------------------------------------


def num_frames(num_samples: Lengths, conv_kernel: Sequence[int], conv_stride: Sequence[int]) -> Lengths:
    """Frames that the convolutions make of `num_samples` samples; 0 for a clip shorter than their field.

    The output length formula of torch.nn.Conv1d without padding, layer by layer.
    """
    for kernel, stride in zip(conv_kernel, conv_stride, strict=True):
        num_samples = (num_samples - kernel) // stride + 1
        # A negative length would come back as a positive one in no layer, but it is not a length either.
        num_samples = max(num_samples, 0) if isinstance(num_samples, int) else num_samples.clip(min=0)
    return num_samples


def masked_axes(hf_config: PretrainedConfig) -> tuple[bool, bool]:
    """Whether training masks frames, and features, by the configuration of an encoder."""
    masks = bool(getattr(hf_config, "apply_spec_augment", True))
    return masks and hf_config.mask_time_prob > 0, masks and hf_config.mask_feature_prob > 0


def draw_masks(
    num_frames: int, hidden_size: int, hf_config: PretrainedConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw SpecAugment's masks of one utterance (https://arxiv.org/abs/1904.08779), from `rng` alone.

    Returns:
        time_mask_T, feature_mask_H: bool, True where the utterance is masked; all False where the configuration asks
        for no masks or the axis is shorter than one span.
    """
    if not getattr(hf_config, "apply_spec_augment", True):
        return np.zeros(num_frames, bool), np.zeros(hidden_size, bool)
    time_mask_T = _draw_spans(
        num_frames, hf_config.mask_time_prob, hf_config.mask_time_length, hf_config.mask_time_min_masks, rng
    )
    feature_mask_H = _draw_spans(
        hidden_size,
        hf_config.mask_feature_prob,
        hf_config.mask_feature_length,
        getattr(hf_config, "mask_feature_min_masks", 0),  # WavLM's configuration lacks it.
        rng,
    )
    return time_mask_T, feature_mask_H


def _draw_spans(
    length: int, probability: float, span_length: int, min_spans: int, rng: np.random.Generator
) -> np.ndarray:
    """Spans that may overlap, as transformers' `_compute_mask_indices` draws them for a row of its own, [length]."""
    mask = np.zeros(length, bool)
    if probability <= 0 or span_length > length:
        return mask
    # Probabilistic rounding: the expected number of spans is exact however short the utterance.
    count = max(int(probability * length / span_length + rng.random()), min_spans)
    count = min(count, length // span_length)
    starts = rng.choice(length - span_length + 1, count, replace=False)
    mask[(starts[:, None] + np.arange(span_length)).ravel()] = True
    return mask


def ctc_loss_sum(
    logits_BTV: Tensor, frame_lengths_B: Tensor, labels_flat: Tensor, label_lengths_B: Tensor, blank_id: int
) -> Tensor:
    """CTC loss of each utterance in nats, summed over its labels; the caller divides once per update.

    Args:
        logits_BTV: of any floating dtype; the loss is computed in fp32.
        frame_lengths_B: valid frames per row, as CTCModel returns them.
        labels_flat: the labels of all rows one behind the other, [sum of label_lengths_B].
        label_lengths_B: number of labels per row.
        blank_id: id of the blank label.

    Returns:
        loss_B, fp32. A row with more labels than frames can hold has loss 0 and no gradient (preflight drops those
        with a reason; this is only a net).
    """
    # bf16 has no CTC kernel, and log-probabilities of long clips need fp32's mantissa.
    with torch.autocast(logits_BTV.device.type, enabled=False):
        log_probs_TBV = F.log_softmax(logits_BTV.float(), dim=-1).transpose(0, 1)
        return F.ctc_loss(
            log_probs_TBV,
            labels_flat,
            frame_lengths_B,
            label_lengths_B,
            blank=blank_id,
            reduction="none",
            zero_infinity=True,
        )


def smoothing_sum(logits_BTV: Tensor, frame_lengths_B: Tensor) -> Tensor:
    """Divergence of each frame's distribution from the uniform one, KL(p_t || uniform) in nats, summed over the frames.

    Label smoothing for CTC: Kim, Seltzer, Li and Zhao, https://arxiv.org/abs/1711.02212. It is log V less the entropy
    of the frame, so at most log V.

    Returns:
        kl_B, fp32.
    """
    log_probs_BTV = _log_probs(logits_BTV)
    kl_BT = (log_probs_BTV.exp() * log_probs_BTV).sum(dim=-1) + math.log(log_probs_BTV.shape[-1])
    return sum_over_valid_frames(kl_BT, frame_lengths_B)


def consistency_sum(one_BTV: Tensor, other_BTV: Tensor, frame_lengths_B: Tensor) -> Tensor:
    """Divergence between the posteriors of two views of the same utterances, in nats, summed over the frames.

    L_CR of CR-CTC (Yao et al., https://arxiv.org/abs/2410.05101, equation 5): 1/2 sum_t KL(sg(b_t) || a_t) +
    KL(sg(a_t) || b_t), where no gradient flows into sg(), the target.

    Returns:
        kl_B, fp32.
    """
    one_BTV, other_BTV = _log_probs(one_BTV), _log_probs(other_BTV)
    kl_BTV = _kl(other_BTV.detach(), one_BTV) + _kl(one_BTV.detach(), other_BTV)
    return sum_over_valid_frames(0.5 * kl_BTV.sum(dim=-1), frame_lengths_B)


def _log_probs(logits_BTV: Tensor) -> Tensor:
    with torch.autocast(logits_BTV.device.type, enabled=False):
        return F.log_softmax(logits_BTV.float(), dim=-1)


def _kl(target_BTV: Tensor, log_probs_BTV: Tensor) -> Tensor:
    return F.kl_div(log_probs_BTV, target_BTV, reduction="none", log_target=True)


def sum_over_valid_frames(value_BT: Tensor, frame_lengths_B: Tensor) -> Tensor:
    """Of each row its first `frame_lengths_B` values."""
    return value_BT.masked_fill(~_valid(frame_lengths_B, value_BT.shape[1], value_BT.device), 0.0).sum(dim=1)


def forward_with_loss(model: "CTCModel", batch: "Batch", blank_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """One micro-batch through the model, on whose device it lies.

    Returns:
        logits_BTV, frame_lengths_B and the CTC loss per utterance, loss_B. Of a batch in two views the logits have the
        rows of the one, then those of the other, and the loss is the mean of theirs.
    """
    masks = batch.time_mask_BT, batch.feature_mask_BH
    if batch.num_views == 2:
        pairs = zip(masks, (batch.other_time_mask_BT, batch.other_feature_mask_BH), strict=True)
        masks = [None if mask is None else torch.cat([mask, other]) for mask, other in pairs]
    logits_BTV, frame_lengths_B = model(batch.input_values_BS, batch.sample_lengths_B, *masks, batch.num_views)
    losses = [
        ctc_loss_sum(view_BTV, frame_lengths_B, batch.labels_L, batch.label_lengths_B, blank_id)
        for view_BTV in logits_BTV.chunk(batch.num_views)
    ]
    return logits_BTV, frame_lengths_B, sum(losses) / batch.num_views if batch.num_views > 1 else losses[0]


@dataclass(frozen=True)
class Objective:
    """What training minimises: the CTC loss, or (1 - smoothing) of it, with what the weights below add.

    Attributes:
        label_smoothing: weight of `smoothing_sum`.
        consistency_weight: of `consistency_sum`, between the two views in which each utterance then passes.
    """

    label_smoothing: float = 0.0
    consistency_weight: float = 0.0

    def of(self, logits_BTV: Tensor, frame_lengths_B: Tensor, loss_B: Tensor) -> Tensor:
        """The value for each utterance, objective_B, from what `forward_with_loss` returned."""
        objective_B = loss_B
        views = logits_BTV.chunk(2) if self.consistency_weight else (logits_BTV,)
        if self.label_smoothing:
            smoothing_B = sum(smoothing_sum(view_BTV, frame_lengths_B) for view_BTV in views) / len(views)
            objective_B = (1 - self.label_smoothing) * loss_B + self.label_smoothing * smoothing_B
        if self.consistency_weight:
            objective_B = objective_B + self.consistency_weight * consistency_sum(*views, frame_lengths_B)
        return objective_B


# --- The model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """What the inner modules must know of the batch that passes through them.

    Behind the convolutions B rows are `num_views` times as many, view by view; the tensors have those.
    """

    num_samples: list[int]
    is_padded: bool
    num_views: int
    valid_BT: Tensor
    time_mask_BT: Tensor | None
    feature_mask_BH: Tensor | None

    @functools.cached_property
    def attended_BT(self) -> Tensor:
        """The frames that others listen to; all of a row that has none, whose softmax would be NaN otherwise."""
        return self.valid_BT | ~self.valid_BT[:, :1]


def _additive_mask(attended_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
    mask_BT = torch.zeros_like(attended_BT, dtype=hidden_BTH.dtype)
    return mask_BT.masked_fill(~attended_BT, torch.finfo(hidden_BTH.dtype).min)[:, None, None]


def _boolean_mask(attended_BT: Tensor, _: Tensor) -> Tensor:
    rows, frames = attended_BT.shape
    return attended_BT[:, None, None].expand(rows, 1, frames, frames)


# What a layer of transformers takes, by its kind of attention: as `create_bidirectional_mask` makes it, or, for WavLM,
# the frames themselves.
ATTENTION_MASKS = {"sdpa": _boolean_mask, "eager": _additive_mask, "keys": lambda attended_BT, _: attended_BT}


class _Passing:
    """Holds the batch that is passing through the model; shared by the model and the modules that it changed."""

    def __init__(self) -> None:
        self.batch: _Batch | None = None

    @contextlib.contextmanager
    def through(self, batch: _Batch | None) -> Iterator[None]:
        outer, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = outer

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For torch.utils.checkpoint: a layer is recomputed with the lengths of its own batch, not of the newest."""
        return contextlib.nullcontext(), self.through(self.batch)


class ValidGroupNorm(nn.GroupNorm):
    """Group norm whose statistics see the valid part of each row only; parameters are nn.GroupNorm's, names included.

    Rows are normalised one by one with torch's own kernel, so that a row's statistics are those of the row alone bit
    for bit, and a batch without padding takes transformers' path unchanged. Statistics and affine map are in fp32
    under autocast too.
    """

    def __init__(self, norm: nn.GroupNorm, kernel: int, stride: int, passing: _Passing) -> None:
        super().__init__(norm.num_groups, norm.num_channels, eps=norm.eps, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self.affine = True
        self.kernel, self.stride = kernel, stride
        self._passing = passing

    def forward(self, hidden_BCT: Tensor) -> Tensor:
        """Normalise; what lies behind the end of a shorter row becomes zero."""
        batch = self._passing.batch
        with torch.autocast(hidden_BCT.device.type, enabled=False):
            if batch is None or not batch.is_padded:
                return self._normalise(hidden_BCT)
            lengths = [num_frames(count, [self.kernel], [self.stride]) for count in batch.num_samples]
            if hidden_BCT.requires_grad or (torch.is_grad_enabled() and self.weight.requires_grad):
                return torch.cat(list(map(self._normalise_row, hidden_BCT.split(1), lengths)))
            normalised_BCT = torch.zeros_like(hidden_BCT)  # One copy less, and the convolutions are mostly frozen.
            for normalised_CT, row_CT, length in zip(normalised_BCT, hidden_BCT, lengths, strict=True):
                if length:
                    normalised_CT[:, :length] = self._normalise(row_CT[None, :, :length])[0]
            return normalised_BCT

    def _normalise_row(self, row_1CT: Tensor, length: int) -> Tensor:
        padding = row_1CT.shape[-1] - length
        if length == 0:
            return torch.zeros_like(row_1CT)
        normalised = self._normalise(row_1CT[..., :length])
        return F.pad(normalised, (0, padding)) if padding else normalised

    def _normalise(self, hidden_BCT: Tensor) -> Tensor:
        # torch.group_norm, because nn.functional's refuses a row of one frame.
        precise = hidden_BCT.to(torch.promote_types(hidden_BCT.dtype, torch.float32))
        normalised = torch.group_norm(precise, self.num_groups, self.weight, self.bias, self.eps)
        return normalised.to(hidden_BCT.dtype)


class EncoderModel(nn.Module):
    """A transformers model (`.hf`) whose encoder hears each utterance alone; what it predicts, subclasses say."""

    # Whether frames are masked outside of training too, where a batch says which.
    masks_in_evaluation = False

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self._passing = _Passing()
        encoder = hf.base_model
        encoder._mask_hidden_states = self._mask_hidden_states
        # Asks for a gradient of the waveform, which only reentrant checkpointing would need.
        encoder.feature_extractor._requires_grad = False
        encoder.feature_extractor.register_forward_hook(self._repeat_for_views)
        self._install_valid_group_norm(encoder.feature_extractor.conv_layers)
        self._install_padding_guards(encoder)
        self._install_attention_masks(encoder.encoder.layers)
        self.masks_time = self._masks_time()
        # What never gets a gradient is not trained; DistributedDataParallel would wait for it.
        if hasattr(encoder, "masked_spec_embed") and not self.masks_time:
            encoder.masked_spec_embed.requires_grad_(False)
        if hf.config.model_type == "wav2vec2-conformer":
            encoder.encoder.pos_conv_embed.requires_grad_(False)

    def _masks_time(self) -> bool:
        """Whether frames are masked at all."""
        return masked_axes(self.hf.config)[0]

    def _install_valid_group_norm(self, conv_layers: nn.ModuleList) -> None:
        for index, layer in enumerate(conv_layers):
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                assert index == 0, "valid lengths are known for the first convolution"
                layer.layer_norm = ValidGroupNorm(norm, layer.conv.kernel_size[0], layer.conv.stride[0], self._passing)

    def _install_padding_guards(self, encoder: nn.Module) -> None:
        for module in encoder.modules():
            name = CONVOLUTIONS_BEHIND_PADDING.get(type(module).__name__)
            if name is not None and getattr(module, "batch_norm", True) is not None:
                getattr(module, name).register_forward_pre_hook(self._silence_padding)

    def _install_attention_masks(self, layers: nn.ModuleList) -> None:
        """Layers get the mask of the batch that passes; transformers' way to it waits for the device three times."""
        config = self.hf.config

        def add_mask(_: nn.Module, inputs: tuple[Tensor], others: dict[str, Any]) -> tuple[Any, Any] | None:
            batch = self._passing.batch
            if batch is None or not batch.is_padded:
                return None
            kind = "keys" if config.model_type == "wavlm" else config._attn_implementation
            return inputs, others | {"attention_mask": ATTENTION_MASKS[kind](batch.attended_BT, inputs[0])}

        for layer in layers:
            layer.register_forward_pre_hook(add_mask, with_kwargs=True)

    def _repeat_for_views(self, _: nn.Module, __: tuple[Tensor], features_BCT: Tensor) -> Tensor:
        batch = self._passing.batch
        return features_BCT if batch is None or batch.num_views == 1 else features_BCT.repeat(batch.num_views, 1, 1)

    def _silence_padding(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        batch = self._passing.batch
        if batch is None or not batch.is_padded:
            return None
        return (inputs[0].masked_fill(~batch.valid_BT[:, None], 0),)

    def train(self, mode: bool = True) -> "EncoderModel":
        """As nn.Module.train, but batch norm (HuBERT variants, conformers) keeps its pre-trained statistics.

        Statistics of a batch would make an utterance depend on its neighbours, and ranks differ.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the layers in the backward pass instead of keeping their activations."""
        self.hf._set_gradient_checkpointing(
            enable=True,
            gradient_checkpointing_func=functools.partial(
                checkpoint, use_reentrant=False, context_fn=self._passing.checkpoint_contexts
            ),
        )

    def freeze_feature_encoder(self) -> None:
        """Stop training the convolutions; their forward pass builds no graph."""
        self.hf.freeze_feature_encoder()

    @contextlib.contextmanager
    def _passing_batch(
        self,
        input_values_BS: Tensor,
        sample_lengths_B: Tensor | Sequence[int],
        time_mask_BT: Tensor | None = None,
        feature_mask_BH: Tensor | None = None,
        num_views: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What a forward pass of `.hf` stands in: gives input_values_BS, and frame_lengths_B on the CPU."""
        config = self.hf.config
        lengths = sample_lengths_B.tolist() if isinstance(sample_lengths_B, Tensor) else list(sample_lengths_B)
        shortfall = self.receptive_field - input_values_BS.shape[1]
        if shortfall > 0:  # A clip of no frame is still scored: it has an empty hypothesis.
            input_values_BS = F.pad(input_values_BS, (0, shortfall))
        samples = input_values_BS.shape[1]
        frame_lengths_B = num_frames(torch.tensor(lengths), config.conv_kernel, config.conv_stride)
        frames = num_frames(samples, config.conv_kernel, config.conv_stride)
        batch = _Batch(
            num_samples=lengths,
            is_padded=min(lengths) < samples,
            num_views=num_views,
            valid_BT=_valid(frame_lengths_B, frames, input_values_BS.device).repeat(num_views, 1),
            time_mask_BT=time_mask_BT,
            feature_mask_BH=feature_mask_BH,
        )
        # Without an attention mask: the layers and the padding guards know the lengths from the batch.
        with self._passing.through(batch):
            yield input_values_BS, frame_lengths_B

    @functools.cached_property
    def receptive_field(self) -> int:
        """Samples that one frame sees; a clip shorter than this has no frame."""
        samples = 1
        for kernel, stride in zip(
            reversed(self.hf.config.conv_kernel), reversed(self.hf.config.conv_stride), strict=True
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def _mask_hidden_states(self, hidden_BTH: Tensor, **_: Any) -> Tensor:
        """Replaces the method of transformers' encoder: the masks are those given to forward."""
        batch = self._passing.batch
        time_mask_BT = batch.time_mask_BT if batch is not None else None
        masks = self.training or self.masks_in_evaluation
        if masks and self.masks_time:
            if time_mask_BT is None:
                # The mask embedding stays in the graph, so that no rank waits for its gradient.
                time_mask_BT = hidden_BTH.new_zeros(hidden_BTH.shape[:2], dtype=torch.bool)
            embedding_H = self.hf.base_model.masked_spec_embed.to(hidden_BTH.dtype)
            hidden_BTH = torch.where(time_mask_BT[..., None], embedding_H, hidden_BTH)
        if masks and batch is not None and batch.feature_mask_BH is not None:
            hidden_BTH = hidden_BTH.masked_fill(batch.feature_mask_BH[:, None], 0)
        if batch is not None and batch.is_padded:
            hidden_BTH = hidden_BTH.masked_fill(~batch.valid_BT[..., None], 0)
        return hidden_BTH


class CTCModel(EncoderModel):
    """A transformers `*ForCTC` whose logits do not depend on an utterance's neighbours.

    One utterance alone in fp32 gives transformers' logits exactly.
    """

    def forward(
        self,
        input_values_BS: Tensor,
        sample_lengths_B: Tensor | Sequence[int],
        time_mask_BT: Tensor | None = None,
        feature_mask_BH: Tensor | None = None,
        num_views: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits.

        Args:
            input_values_BS: waveforms, padded at the end.
            sample_lengths_B: valid samples per row, on the CPU or as a list (on a GPU they cost a synchronisation).
            time_mask_BT: bool, frames to replace by the mask embedding (draw_masks).
            feature_mask_BH: bool, features to set to zero.
            num_views: how often each row passes through the layers; masks and logits have the rows of the first view,
                then those of the second.

        Returns:
            logits_BTV, and frame_lengths_B: valid frames per row, int64 on the CPU. Logits behind them mean nothing.
        """
        inputs = input_values_BS, sample_lengths_B, time_mask_BT, feature_mask_BH, num_views
        with self._passing_batch(*inputs) as (input_values_BS, frame_lengths_B):
            logits_BTV = self.hf(input_values_BS).logits
        return logits_BTV, frame_lengths_B


def _valid(lengths_B: Tensor, length: int, device: torch.device) -> Tensor:
    """True for the positions before each row's length, bool [B, length]; only the lengths travel to the device."""
    return torch.arange(length, device=device) < lengths_B.to(device, non_blocking=True)[:, None]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that are trained, and of those that are frozen."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters()) - trained


def optimizer_groups(
    model: nn.Module, weight_decay: float, layer_lr_decay: float = 1.0, head_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices and kernels decay; biases, norms and gains do not.

    Args:
        model: whose trained parameters are grouped.
        weight_decay: of those that decay.
        layer_lr_decay: d; of n layers, layer i (from 1) learns at d^(n + 1 - i) of the rate and what lies before
            them at d^(n + 1), as in ELECTRA's fine-tuning (https://arxiv.org/abs/2003.10555).
        head_lr_scale: rate of the output layer over the others'.

    Returns:
        Groups with `lr_scale`, the share of the schedule's rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_gain = parameter.ndim <= 1 or name.endswith(GAIN_NAMES)
            scale = head_lr_scale if is_of_head(name) else layer_lr_decay ** _layers_above(model, name)
            groups.setdefault((scale, is_gain), []).append(parameter)
    return [
        {"params": groups[scale, is_gain], "weight_decay": 0.0 if is_gain else weight_decay, "lr_scale": scale}
        for scale, is_gain in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def is_of_head(name: str) -> bool:
    """Whether a parameter of a CTCModel belongs to the output layer."""
    return name.removeprefix("hf.").startswith("lm_head.")


def _layers_above(model: nn.Module, name: str) -> int:
    """Layers from the one of this parameter up to the output layer, which is counted; at least 1."""
    layers = len(model.hf.base_model.encoder.layers)
    found = re.search(r"\.encoder\.layers\.(\d+)\.", name)
    if found:
        return layers - int(found.group(1))
    # The encoder's own norm stands behind the layers or before them.
    is_behind = ".encoder.layer_norm." in name and getattr(model.hf.config, "do_stable_layer_norm", False)
    return 1 if is_behind else layers + 1
