"""The acoustic model: loading, valid-sample group norm, SpecAugment with given masks, the CTC loss, saving.

Dimensions: B utterances, S samples, T frames, V vocabulary, L labels, H hidden size, C channels of a convolution.

An utterance must give the same logits in every batch (promises 1 and 2). Three things in transformers break that, and
are mended here without changing a parameter name, so that checkpoints stay transformers' own: group norm takes its
statistics over the padding too, convolutions over time read what lies behind the end of a shorter row, and SpecAugment
masks come from numpy's global state.
"""

import contextlib
import difflib
import functools
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CTC_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from transformers.utils import logging as transformers_logging

from errors import UsageError
from text import LARGE_960H_VOCABULARY, TextNormalizer, Vocabulary, build_tokenizer, build_vocabulary, resolve_case

if TYPE_CHECKING:
    from config import TrainConfig

# WavLM's own call of torch's attention mixes mask types, at every forward pass.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")

Lengths = TypeVar("Lengths", int, np.ndarray, Tensor)

SAMPLE_RATE_HZ = 16_000
HUB_TIMEOUT_SECONDS = 10
# Families that take waveforms and whose frame count follows from the convolutions alone.
FAMILIES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer")
# Convolutions over time whose input is no longer zero in the padding, by the class that holds them.
CONVOLUTIONS_BEHIND_PADDING = {
    "Data2VecAudioPositionalConvLayer": "conv",
    "HubertPositionalConvEmbedding": "conv",  # Only with conv_pos_batch_norm; its shift fills the padding.
    "Wav2Vec2ConformerConvolutionModule": "depthwise_conv",
}
# Any other attention named by a config.json would be fetched from the Hub and run.
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")
# What separates a pre-training checkpoint from a fine-tuned one (field-notes, trap 34). Anything else is refused.
MISSING_ALLOWED = re.compile(r"(lm_head\.(weight|bias)|(\w+\.)?masked_spec_embed)$")
UNEXPECTED_ALLOWED = re.compile(r"((quantizer|project_q|project_hid)\..+|(\w+\.)?masked_spec_embed)$")
# Gains that are stored with more than one dimension, and still are no matrices to decay.
GAIN_NAMES = ("weight.original0", "weight_g", "gru_rel_pos_const")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


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


# --- The model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """What the inner modules must know of the batch that passes through them."""

    num_samples: list[int]
    is_padded: bool
    valid_BT: Tensor
    time_mask_BT: Tensor | None
    feature_mask_BH: Tensor | None


class _Passing:
    """Holds the batch that is passing through the model; shared by CTCModel and the modules that it changed."""

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
            return torch.cat(
                [
                    self._normalise_row(row_1CT, num_frames(count, [self.kernel], [self.stride]))
                    for row_1CT, count in zip(hidden_BCT.split(1), batch.num_samples, strict=True)
                ]
            )

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


class CTCModel(nn.Module):
    """A transformers `*ForCTC` (`.hf`) whose logits do not depend on an utterance's neighbours.

    One utterance alone in fp32 gives transformers' logits exactly.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self._passing = _Passing()
        encoder = hf.base_model
        encoder._mask_hidden_states = self._mask_hidden_states
        # Asks for a gradient of the waveform, which only reentrant checkpointing would need.
        encoder.feature_extractor._requires_grad = False
        self._install_valid_group_norm(encoder.feature_extractor.conv_layers)
        self._install_padding_guards(encoder)
        self.masks_time = bool(getattr(hf.config, "apply_spec_augment", True) and hf.config.mask_time_prob > 0)
        # What never gets a gradient is not trained; DistributedDataParallel would wait for it.
        if hasattr(encoder, "masked_spec_embed") and not self.masks_time:
            encoder.masked_spec_embed.requires_grad_(False)
        if hf.config.model_type == "wav2vec2-conformer":
            encoder.encoder.pos_conv_embed.requires_grad_(False)

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

    def _silence_padding(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        batch = self._passing.batch
        if batch is None or not batch.is_padded:
            return None
        return (inputs[0].masked_fill(~batch.valid_BT[:, None], 0),)

    def train(self, mode: bool = True) -> "CTCModel":
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

    def forward(
        self,
        input_values_BS: Tensor,
        sample_lengths_B: Tensor | Sequence[int],
        time_mask_BT: Tensor | None = None,
        feature_mask_BH: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits.

        Args:
            input_values_BS: waveforms, padded at the end.
            sample_lengths_B: valid samples per row, on the CPU or as a list (on a GPU they cost a synchronisation).
            time_mask_BT: bool, frames to replace by the mask embedding (draw_masks).
            feature_mask_BH: bool, features to set to zero.

        Returns:
            logits_BTV, and frame_lengths_B: valid frames per row, int64 on the CPU. Logits behind them mean nothing.
        """
        config = self.hf.config
        lengths = sample_lengths_B.tolist() if isinstance(sample_lengths_B, Tensor) else list(sample_lengths_B)
        shortfall = self.receptive_field - input_values_BS.shape[1]
        if shortfall > 0:  # A clip of no frame is still scored: it has an empty hypothesis.
            input_values_BS = F.pad(input_values_BS, (0, shortfall))
        samples = input_values_BS.shape[1]
        frame_lengths_B = num_frames(torch.tensor(lengths), config.conv_kernel, config.conv_stride)
        frames = num_frames(samples, config.conv_kernel, config.conv_stride)
        device = input_values_BS.device
        batch = _Batch(
            num_samples=lengths,
            is_padded=min(lengths) < samples,
            valid_BT=_valid(frame_lengths_B, frames, device),
            time_mask_BT=time_mask_BT,
            feature_mask_BH=feature_mask_BH,
        )
        attention_mask_BS = _valid(torch.tensor(lengths), samples, device).long()
        with self._passing.through(batch):
            logits_BTV = self.hf(input_values_BS, attention_mask=attention_mask_BS).logits
        return logits_BTV, frame_lengths_B

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
        """Replaces the method of transformers' encoder: the masks are those given to forward, in evaluation none."""
        batch = self._passing.batch
        time_mask_BT = batch.time_mask_BT if batch is not None else None
        if self.training and self.masks_time:
            if time_mask_BT is None:
                # The mask embedding stays in the graph, so that no rank waits for its gradient.
                time_mask_BT = hidden_BTH.new_zeros(hidden_BTH.shape[:2], dtype=torch.bool)
            embedding_H = self.hf.base_model.masked_spec_embed.to(hidden_BTH.dtype)
            hidden_BTH = torch.where(time_mask_BT[..., None], embedding_H, hidden_BTH)
        if self.training and batch is not None and batch.feature_mask_BH is not None:
            hidden_BTH = hidden_BTH.masked_fill(batch.feature_mask_BH[:, None], 0)
        return hidden_BTH


def _valid(lengths_B: Tensor, length: int, device: torch.device) -> Tensor:
    """True for the positions before each row's length, bool [B, length]; only the lengths travel to the device."""
    return torch.arange(length, device=device) < lengths_B.to(device, non_blocking=True)[:, None]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that are trained, and of those that are frozen."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters()) - trained


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices and kernels decay; biases, norms and gains do not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_gain = parameter.ndim <= 1 or name.endswith(GAIN_NAMES)
            (free if is_gain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


# --- Loading -------------------------------------------------------------------------------------------------------


@dataclass
class LoadedModel:
    """A model with the processor and labels that belong to it."""

    model: CTCModel
    processor: Wav2Vec2Processor
    vocabulary: Vocabulary
    notes: list[str]
    """What happened and must be said aloud: vocabulary, new head, missing and unexpected weights."""
    head_fits: bool
    """The head was trained for this very vocabulary, so the model can be scored before training."""


def load_model(config: "TrainConfig", training_texts: Callable[[], Iterable[str]]) -> LoadedModel:
    """Load a checkpoint, or build a model from `config.model_config` with random weights.

    Args:
        config: the settings of the run.
        training_texts: gives the raw training transcripts; called only when the vocabulary is built from them.

    Raises:
        UsageError: for everything that is wrong with the checkpoint, the configuration or the vocabulary.
    """
    with _quiet_transformers():
        if config.model_name_or_path is not None:
            return _load_checkpoint(config, training_texts)
        return _build_from_config(config, training_texts)


def _load_checkpoint(config: "TrainConfig", training_texts: Callable[[], Iterable[str]]) -> LoadedModel:
    folder = _find_checkpoint_folder(config.model_name_or_path)
    hf_config = _read_config(folder)
    _override(hf_config, config.model_overrides or {}, "model_overrides")
    _check_architecture(hf_config, folder)
    has_weights = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not has_weights:
        raise UsageError(f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES)} is needed")
    tokenizer = _read_tokenizer(folder, hf_config.vocab_size, is_needed=config.vocabulary in ("auto", "model"))
    labels, notes = _choose_vocabulary(config, tokenizer, training_texts)
    same_labels = tokenizer is not None and labels == tokenizer.get_vocab()
    tokenizer = tokenizer if same_labels else build_tokenizer(labels)

    trained_outputs = hf_config.vocab_size
    _set_vocabulary(hf_config, tokenizer, len(labels))
    weights = _read_weights(folder, hf_config, has_weights[0], config.seed)
    hf = weights.model
    head_fits = same_labels and weights.has_head and trained_outputs == len(labels)
    if not head_fits:
        _draw_head(hf.lm_head, hf_config, config.seed)
        old = (
            f"the checkpoint's {trained_outputs} belong to another vocabulary" if weights.has_head else "there was none"
        )
        notes.append(f"head: new, {len(labels)} outputs; {old}")
    notes += weights.notes()
    feature_extractor, said = _read_feature_extractor(folder, hf_config)
    return _assemble(config, hf, feature_extractor, tokenizer, notes + said, head_fits)


def _build_from_config(config: "TrainConfig", training_texts: Callable[[], Iterable[str]]) -> LoadedModel:
    fields = dict(config.model_config)
    hf_config = CONFIG_MAPPING[_known_family(fields.pop("model_type", None), "model_config")]()
    _override(hf_config, fields, "model_config")
    _override(hf_config, config.model_overrides or {}, "model_overrides")
    _check_architecture(hf_config, "model_config")
    labels, notes = _choose_vocabulary(config, None, training_texts)
    tokenizer = build_tokenizer(labels)
    _set_vocabulary(hf_config, tokenizer, len(labels))
    with _seeded(config.seed):
        try:
            hf = MODEL_FOR_CTC_MAPPING[type(hf_config)](hf_config)
        except UNREADABLE as error:
            raise UsageError(
                f"model_config does not make a {hf_config.model_type} model: {_one_line(error)}"
            ) from error
    _draw_head(hf.lm_head, hf_config, config.seed)
    notes.append(f"model: {hf_config.model_type} with random weights")
    feature_extractor, _ = _default_feature_extractor(hf_config)
    return _assemble(config, hf, feature_extractor, tokenizer, notes, head_fits=False)


def _assemble(
    config: "TrainConfig",
    hf: PreTrainedModel,
    feature_extractor: Wav2Vec2FeatureExtractor,
    tokenizer: Wav2Vec2CTCTokenizer,
    notes: list[str],
    head_fits: bool,
) -> LoadedModel:
    model = CTCModel(hf)
    if config.freeze_feature_encoder:
        model.freeze_feature_encoder()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    processor = Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)
    return LoadedModel(model, processor, Vocabulary.from_tokenizer(tokenizer), notes, head_fits)


def _find_checkpoint_folder(name: str) -> Path:
    """The folder itself, or the snapshot of a Hub repository, downloaded when it is not on the disk yet."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(
            f"--model_name_or_path {name} is a file; name the folder that holds config.json and the weights"
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(f"--model_name_or_path {name}: there is no such folder")
    local = f"hf download {name} --local-dir {Path(name).name}"
    try:
        return Path(_download(name))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UsageError(
            f"--model_name_or_path {name} is no folder here, and the Hugging Face Hub cannot be reached; on a machine "
            f"that can: {local}, then --model_name_or_path {Path(name).name}"
        ) from error
    except HFValidationError as error:
        raise UsageError(
            f"--model_name_or_path {name} is neither a folder nor a name on the Hugging Face Hub"
        ) from error
    except GatedRepoError as error:
        raise UsageError(f"{name} is gated: accept its terms on huggingface.co, then run hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"--model_name_or_path {name} is no folder here, and no public model on the Hugging Face Hub "
            "(a private one needs hf auth login)"
        ) from error
    except Exception as error:  # The HTTP client, and with it the type of its errors, changes with huggingface_hub.
        raise UsageError(f"the download of {name} failed ({_one_line(error)}); try {local}") from error


def _download(name: str) -> str:
    """The path of the snapshot. Without a network the one on the disk is taken, at once and without retries."""
    fetch = functools.partial(snapshot_download, name, etag_timeout=HUB_TIMEOUT_SECONDS)
    folder = fetch(allow_patterns=["config.json", "model*.safetensors*", *TOKENIZER_FILES, *PROCESSOR_FILES])
    if not any((Path(folder) / weights).is_file() for weights in WEIGHT_FILES):
        folder = fetch(allow_patterns=["pytorch_model*.bin*"])
    return folder


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a checkpoint: it has no config.json")
    fields = _read_json(path)
    family = _known_family(fields.get("model_type"), path)
    for name in ("attn_implementation", "_attn_implementation"):
        if fields.get(name) not in ATTENTIONS:
            raise UsageError(
                f"{path}: {name} names code to download ({fields[name]!r}), which is never run; take it out"
            )
    if fields.get("quantization_config") is not None:
        raise UsageError(f"{path}: the checkpoint is quantized and cannot be trained; use the original one")
    try:
        # The class of the family, never one named by the folder: no remote code.
        return CONFIG_MAPPING[family].from_pretrained(folder)
    except UNREADABLE as error:
        raise UsageError(f"{path} is not a {family} configuration: {_one_line(error)}") from error


def _known_family(family: Any, source: object) -> str:
    if family in FAMILIES:
        return family
    raise UsageError(
        f"{source}: model_type is {family!r}; a family that turns waveforms into CTC is needed: {', '.join(FAMILIES)}"
    )


def _check_architecture(hf_config: PretrainedConfig, source: object) -> None:
    # transformers derives it from conv_dim when a configuration is made, not when a field is changed.
    hf_config.num_feat_extract_layers = len(hf_config.conv_dim)
    if getattr(hf_config, "add_adapter", False):
        raise UsageError(
            f"{source}: add_adapter shortens the frames behind the encoder and is not supported; set it to false"
        )
    if not len(hf_config.conv_dim) == len(hf_config.conv_kernel) == len(hf_config.conv_stride):
        raise UsageError(f"{source}: conv_dim, conv_kernel and conv_stride must have the same length")


def _override(hf_config: PretrainedConfig, fields: Mapping[str, Any], source: str) -> None:
    known = hf_config.to_dict().keys() - {"model_type", "vocab_size", "pad_token_id"}
    problems = []
    for name, value in fields.items():
        if name in ("vocab_size", "pad_token_id"):
            problems.append(f"{name} follows from the vocabulary, take it out")
        elif name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown field {name}" + (f", nearest is {nearest[0]}" if nearest else ""))
        else:
            try:
                setattr(hf_config, name, value)
            except UNREADABLE as error:
                problems.append(f"{name}: {_one_line(error)}")
    if problems:
        raise UsageError(f"{source}: " + "; ".join(problems))


def _choose_vocabulary(
    config: "TrainConfig", tokenizer: Wav2Vec2CTCTokenizer | None, training_texts: Callable[[], Iterable[str]]
) -> tuple[dict[str, int], list[str]]:
    """The labels as token to id, and what is to be said about them."""
    choice = config.vocabulary
    if choice == "model" and tokenizer is None:
        raise UsageError("--vocabulary model: the checkpoint has no tokenizer (vocab.json); use --vocabulary train")
    if choice == "large_960h":
        return dict(LARGE_960H_VOCABULARY), ["vocabulary: the 32 tokens of facebook/wav2vec2-large-960h"]
    if choice == "model" or (choice == "auto" and tokenizer is not None):
        labels = tokenizer.get_vocab()
        return labels, [f"vocabulary: {len(labels)} tokens of the checkpoint's tokenizer"]
    if choice not in ("auto", "train"):
        labels = _read_vocabulary(Path(choice).expanduser())
        return labels, [f"vocabulary: {len(labels)} tokens of {choice}"]
    case = "lower" if config.case == "auto" else resolve_case(config.case, {})
    normalizer = TextNormalizer(characters_to_ignore=config.characters_to_ignore, case=case)
    labels = build_vocabulary(normalizer(text) for text in training_texts())
    because = ", for the checkpoint has no tokenizer" if choice == "auto" and config.model_name_or_path else ""
    return labels, [f"vocabulary: {len(labels)} tokens built from the training text{because}"]


def _read_vocabulary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise UsageError(f"--vocabulary {path}: there is no such file (auto, model, train and large_960h need none)")
    labels = _read_json(path)
    _check_labels(labels, path)
    return labels


def _check_labels(labels: dict[str, Any], path: Path) -> None:
    """A vocabulary gives each token an id of its own, 0 up to its size."""
    wrong = [token for token, index in labels.items() if type(index) is not int]
    if wrong:
        raise UsageError(f"{path}: the id of {wrong[0]!r} is {labels[wrong[0]]!r}, not a whole number")
    owners: dict[int, str] = {}
    for token, index in labels.items():
        if index in owners:
            raise UsageError(f"{path}: {owners[index]!r} and {token!r} share the id {index}")
        owners[index] = token
    gaps = [index for index in range(len(labels)) if index not in owners]
    if gaps:
        raise UsageError(f"{path}: {len(labels)} tokens need the ids 0 to {len(labels) - 1}, and {gaps[0]} is missing")


def _read_tokenizer(folder: Path, head_size: int, is_needed: bool) -> Wav2Vec2CTCTokenizer | None:
    """The checkpoint's tokenizer; None where it has none, or an unreadable one that is not needed."""
    if not (folder / "vocab.json").is_file():
        return None
    try:
        tokenizer = _open_tokenizer(folder)
    except UsageError:
        if is_needed:
            raise
        return None
    if len(tokenizer.encoder) == head_size < len(tokenizer.get_vocab()):
        # Trap 19: `<s>` and `</s>` were added by the class, and the head knows nothing of them.
        return build_tokenizer(dict(tokenizer.encoder))
    return tokenizer


def _open_tokenizer(folder: Path) -> Wav2Vec2CTCTokenizer:
    _read_json(folder / "vocab.json")
    settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    kind = settings.get("tokenizer_class") or "Wav2Vec2CTCTokenizer"
    if kind not in ("Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer"):
        raise UsageError(f"{folder}: its tokenizer is a {kind}, which is none of characters; use --vocabulary train")
    try:
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        raise UsageError(f"{folder}: its tokenizer cannot be read: {_one_line(error)}") from error
    _check_labels(tokenizer.get_vocab(), folder / "vocab.json")
    return tokenizer


def _set_vocabulary(hf_config: PretrainedConfig, tokenizer: Wav2Vec2CTCTokenizer, size: int) -> None:
    assert len(tokenizer) == size, f"tokenizer of {len(tokenizer)} tokens for a head of {size} outputs"
    hf_config.vocab_size = size
    hf_config.pad_token_id = tokenizer.pad_token_id  # transformers takes it for the blank
    labels = tokenizer.get_vocab()
    hf_config.bos_token_id, hf_config.eos_token_id = labels.get("<s>"), labels.get("</s>")
    # For whoever trains on with transformers: "sum" makes the gradient grow with the batch (trap 18).
    hf_config.ctc_loss_reduction, hf_config.ctc_zero_infinity = "mean", True


@dataclass(frozen=True)
class _Weights:
    """A model read from files, with the keys that did not match."""

    model: PreTrainedModel
    missing: set[str]
    unexpected: set[str]

    @property
    def has_head(self) -> bool:
        return "lm_head.weight" not in self.missing

    def notes(self) -> list[str]:
        notes = []
        drawn = {key for key in self.missing if not key.startswith("lm_head.")}
        if drawn:
            notes.append(f"weights: {_some(drawn)} drawn anew, not in the checkpoint")
        if self.unexpected:
            groups = _some({key.split(".")[0] for key in self.unexpected})
            notes.append(f"weights: {len(self.unexpected)} of the checkpoint not used ({groups})")
        return notes


def _read_weights(folder: Path, hf_config: PretrainedConfig, weights: str, seed: int) -> _Weights:
    """Read safetensors, or .bin without running code; refuse keys that are not on the allow-list."""
    try:
        with _seeded(seed):
            hf, info = MODEL_FOR_CTC_MAPPING[type(hf_config)].from_pretrained(
                folder,
                config=hf_config,
                # Master weights are fp32 whatever the file holds; autocast does the rest.
                dtype=torch.float32,
                use_safetensors="safetensors" in weights,
                weights_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise UsageError(f"{folder / weights} cannot be read as weights: {_one_line(error)}") from error
    misshapen = {key for key, *_ in info["mismatched_keys"] if not key.startswith("lm_head.")}
    if misshapen:
        raise UsageError(f"{folder}: weights and config.json disagree on the shape of {_some(misshapen)}")
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    lacking = {key for key in missing if not MISSING_ALLOWED.match(key)}
    foreign = {key for key in unexpected if not UNEXPECTED_ALLOWED.match(key)}
    if lacking or foreign:
        parts = [f"missing: {_some(lacking)}"] if lacking else []
        parts += [f"unexpected: {_some(foreign)}"] if foreign else []
        raise UsageError(f"{folder / weights} does not hold a {hf_config.model_type} model; " + "; ".join(parts))
    return _Weights(hf, missing, unexpected)


def _draw_head(head: nn.Linear, hf_config: PretrainedConfig, seed: int) -> None:
    """Draw as transformers would, but from a generator of its own: the same head whatever else was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, hf_config.initializer_range, generator=generator)
        head.bias.zero_()


def _read_feature_extractor(folder: Path, hf_config: PretrainedConfig) -> tuple[Wav2Vec2FeatureExtractor, list[str]]:
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return _default_feature_extractor(hf_config)
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    except UNREADABLE as error:
        raise UsageError(f"{folder}: its feature extractor cannot be read: {_one_line(error)}") from error
    if extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise UsageError(f"{folder} hears {extractor.sampling_rate} Hz; prepared data is {SAMPLE_RATE_HZ} Hz")
    return extractor, []


def _default_feature_extractor(hf_config: PretrainedConfig) -> tuple[Wav2Vec2FeatureExtractor, list[str]]:
    masked = getattr(hf_config, "feat_extract_norm", "layer") == "layer"
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE_HZ, do_normalize=True, return_attention_mask=masked)
    return extractor, ["feature extractor: the checkpoint has none; waveforms get zero mean and unit variance"]


# --- Saving --------------------------------------------------------------------------------------------------------


def save_model(loaded: LoadedModel, folder: Path | str) -> None:
    """Write weights and processor in Hugging Face format, as `pipeline("automatic-speech-recognition")` opens it."""
    assert len(loaded.processor.tokenizer) == loaded.model.hf.config.vocab_size
    with _quiet_transformers():
        loaded.model.hf.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
        # transformers 4 looks for the feature extractor in a file of its own.
        loaded.processor.feature_extractor.save_pretrained(folder)


# --- Small things --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU come from `seed`, and the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its load report, advice and bars stay off the screen: what matters of them is in our notes. Errors still rise."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, a mapping is needed")
    return content


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
