"""The two architectures that the project's recipes start from, checkpoints that look like the published ones, and
tiny models of every family.

Weights are random. Fields and files follow facebook/wav2vec2-large-960h and facebook/wav2vec2-xls-r-300m.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from transformers import MODEL_FOR_CTC_MAPPING, Wav2Vec2Config, Wav2Vec2ForCTC

from levers import Adaptation
from model import CTCModel
from pretrained import LoadedModel, load_model
from text import LARGE_960H_VOCABULARY

COMMON = {
    "model_type": "wav2vec2",
    "apply_spec_augment": True,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "conv_dim": [512, 512, 512, 512, 512, 512, 512],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "feat_proj_dropout": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_feature_length": 10,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "num_attention_heads": 16,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "vocab_size": 32,
}


@dataclass(frozen=True)
class Architecture:
    name: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    is_pretrained_only: bool
    """No head and no tokenizer, but the quantizer and projections of pre-training."""

    @property
    def recipe(self) -> dict[str, Any]:
        """As `model_config` of a recipe: without what follows from the vocabulary, and what no model reads."""
        left_out = {"architectures", "hidden_dropout_prob", "feat_extract_dropout", "gradient_checkpointing"}
        left_out |= {"vocab_size", "pad_token_id"}
        return {name: value for name, value in self.config.items() if name not in left_out}


LARGE_960H = Architecture(
    name="facebook/wav2vec2-large-960h",
    config=COMMON
    | {
        "architectures": ["Wav2Vec2ForCTC"],
        "activation_dropout": 0.1,
        "conv_bias": False,
        "do_stable_layer_norm": False,
        "feat_extract_norm": "group",
        "final_dropout": 0.1,
        "hidden_dropout_prob": 0.1,
        "mask_time_prob": 0.05,
    },
    preprocessor={
        "do_normalize": True,
        "feature_dim": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": 16000,
    },
    is_pretrained_only=False,
)

XLS_R_300M = Architecture(
    name="facebook/wav2vec2-xls-r-300m",
    config=COMMON
    | {
        "architectures": ["Wav2Vec2ForPreTraining"],
        "activation_dropout": 0.0,
        "codevector_dim": 768,
        "contrastive_logits_temperature": 0.1,
        "conv_bias": True,
        "diversity_loss_weight": 0.1,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "feat_quantizer_dropout": 0.0,
        "final_dropout": 0.0,
        "mask_time_prob": 0.075,
        "num_codevector_groups": 2,
        "num_codevectors_per_group": 320,
        "num_negatives": 100,
        "proj_codevector_dim": 768,
        "torch_dtype": "float32",
    },
    preprocessor={
        "do_normalize": True,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0,
        "return_attention_mask": True,
        "sampling_rate": 16000,
    },
    is_pretrained_only=True,
)


# Of wav2vec2-base, the others as for the large one.
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def shrink(architecture: Architecture) -> Architecture:
    """The same kind of model with the same files, small enough for a fast test."""
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": [16, 16, 16, 16, 16, 16, 16],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "codevector_dim": 24,
        "proj_codevector_dim": 24,
    }
    return replace(architecture, config=architecture.config | small)


def write_published_like_checkpoint(
    folder: Path,
    architecture: Architecture,
    file_format: Literal["safetensors", "bin"],
    weight_norm: Literal["weight_g", "parametrizations"] = "weight_g",
) -> None:
    """Write a checkpoint with random weights and the keys and files of the published one.

    Missing is `masked_spec_embed`, and for pre-trained models the head and the tokenizer; unexpected are the
    quantizer and the projections of pre-training (field-notes, trap 34).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _published_tensors(architecture, weight_norm)
    if file_format == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    _write(folder / "config.json", architecture.config)
    _write(folder / "preprocessor_config.json", architecture.preprocessor)
    if not architecture.is_pretrained_only:
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        _write(folder / "vocab.json", LARGE_960H_VOCABULARY)
        _write(folder / "special_tokens_map.json", special)
        _write(
            folder / "tokenizer_config.json",
            special | {"do_lower_case": False, "return_attention_mask": False, "do_normalize": True},
        )


def _published_tensors(architecture: Architecture, weight_norm: str) -> dict[str, torch.Tensor]:
    config = architecture.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = Wav2Vec2ForCTC(Wav2Vec2Config(**config)).state_dict()
        del tensors["wav2vec2.masked_spec_embed"]
        if architecture.is_pretrained_only:
            del tensors["lm_head.weight"], tensors["lm_head.bias"]
            codes = config["num_codevector_groups"] * config["num_codevectors_per_group"]
            width = config["codevector_dim"] // config["num_codevector_groups"]
            tensors["quantizer.codevectors"] = torch.rand(1, codes, width)
            tensors["quantizer.weight_proj.weight"] = torch.rand(codes, config["conv_dim"][-1])
            tensors["quantizer.weight_proj.bias"] = torch.rand(codes)
            for name, inputs in (("project_q", config["codevector_dim"]), ("project_hid", config["hidden_size"])):
                tensors[f"{name}.weight"] = torch.rand(config["proj_codevector_dim"], inputs)
                tensors[f"{name}.bias"] = torch.rand(config["proj_codevector_dim"])
    if weight_norm == "weight_g":
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, old in names.items():
            prefix = "wav2vec2.encoder.pos_conv_embed.conv."
            tensors[prefix + old] = tensors.pop(prefix + new)
    return tensors


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


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


@dataclass(frozen=True)
class Settings(Adaptation):
    """The fields of TrainConfig that load_model reads."""

    encoder_settings: ClassVar[dict[str, float]] = {}
    model_name_or_path: str | None = None
    model_config: dict[str, Any] | None = None
    model_overrides: dict[str, Any] | None = None
    target_lang: str | None = None
    vocabulary: str = "auto"
    vocabulary_min_count: int = 1
    head: str = "auto"
    languages: tuple[str, ...] = ()
    characters_to_ignore: str = ",.?"
    case: str = "auto"
    freeze_feature_encoder: bool = False
    gradient_checkpointing: bool = False
    seed: int = 7


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


def waves(lengths: list[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, generator=generator).to(dtype) for length in lengths]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
