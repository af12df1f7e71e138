"""Attention adapters: a small layer behind each block of an encoder, and one set of them per language in MMS
(https://arxiv.org/abs/2305.13516).

MMS is one encoder with a vocabulary per language (vocab.json: language to token to id) and a file per language,
adapter.{language}.safetensors or .bin, that holds the adapters, their norms and the output layer.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2AttnAdapterLayer

from errors import UsageError

if TYPE_CHECKING:
    from model import CTCModel

# As transformers names them.
LANGUAGE_FILES = ("adapter.{}.safetensors", "adapter.{}.bin")
# Of MMS.
DEFAULT_DIM = 16
# What a language is called that has no name yet.
UNNAMED = "new"
HEAD = "lm_head."
SHOWN_LANGUAGES = 8


def languages_of(vocabulary: Mapping[str, Any]) -> dict[str, dict[str, int]] | None:
    """The vocabularies in the content of a vocab.json by language; None where it holds a single one."""
    is_nested = bool(vocabulary) and all(isinstance(one, dict) for one in vocabulary.values())
    return dict(vocabulary) if is_nested else None


def labels_of_language(vocabulary: Mapping[str, Any], language: str, source: object) -> dict[str, int]:
    """The labels of one language.

    Raises:
        UsageError: there is none of this name; names the nearest, or those that there are.
    """
    languages = languages_of(vocabulary)
    if languages is None:
        raise UsageError(f"--target_lang {language}: {source} has one vocabulary for all; leave the flag out")
    if language in languages:
        return languages[language]
    nearest = difflib.get_close_matches(language, languages, n=3)
    listed = sorted(languages)[:SHOWN_LANGUAGES]
    said = f"the nearest are {', '.join(nearest)}" if nearest else f"there are {', '.join(listed)}"
    said += f" and {len(languages) - len(listed)} more" if not nearest and len(languages) > len(listed) else ""
    raise UsageError(
        f"--target_lang {language}: {source} has {len(languages)} languages and not this one, {said}; for a language "
        "that it lacks leave the flag out and give --vocabulary train: adapters and output layer are then drawn anew"
    )


def prepare(hf_config: PretrainedConfig, dim: int | None, source: object) -> bool:
    """Make sure that the model of this configuration has attention adapters, `dim` wide where it has none yet.

    Returns:
        Whether they are new.

    Raises:
        UsageError: this encoder cannot have them, or has some of another width.
    """
    instead = "use --lora_rank 8, which every family has"
    if not hasattr(hf_config, "adapter_attn_dim"):
        raise UsageError(f"--train_adapters: {source} is a {hf_config.model_type}, which has no adapters; {instead}")
    if not hf_config.do_stable_layer_norm:
        raise UsageError(
            f"--train_adapters: {source} has no layer norm before its blocks (do_stable_layer_norm), and transformers "
            f"gives adapters only to encoders that do, as XLS-R and MMS; {instead}"
        )
    own = hf_config.adapter_attn_dim
    if own is not None and dim not in (None, own):
        raise UsageError(f"--adapter_attn_dim {dim}: the adapters of {source} are {own} wide; leave the flag out")
    hf_config.adapter_attn_dim = own or dim or DEFAULT_DIM
    return own is None


def is_of_adapter(name: str) -> bool:
    """Whether a weight of this name belongs to an attention adapter."""
    return ".adapter_layer." in name


def draw(hf: PreTrainedModel, seed: int) -> None:
    """Give all adapters the weights that transformers gives those of a new model, from a generator of their own.

    Its `init_adapter_layers` leaves them as they are in transformers 5: `_init_weights` of a layer does not reach the
    matrices in it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in _layers(hf):
            for linear in (layer.linear_1, layer.linear_2):
                linear.weight.normal_(0.0, hf.config.initializer_range, generator=generator)
                linear.bias.zero_()
            layer.norm.weight.fill_(1.0)
            layer.norm.bias.zero_()


def load_language(hf: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: object) -> None:
    """Put the weights of a language's file in place, those of the output layer too.

    Args:
        hf: whose output layer has the size of the language's.
        weights: by name.
        source: the file, for messages.

    Raises:
        UsageError: other names or shapes than this model's adapters have.
    """
    own = weights_of(hf)
    differing = sorted(own.keys() ^ weights.keys())
    if differing:
        raise UsageError(f"{source} does not hold the adapters of this model: it differs in {', '.join(differing[:3])}")
    misshapen = [name for name, value in weights.items() if value.shape != own[name].shape]
    if misshapen:
        name = misshapen[0]
        raise UsageError(
            f"{source}: {name} has the shape {list(weights[name].shape)}, and the model {list(own[name].shape)}"
        )
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def weights_of(hf: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What a language's file holds: the adapters with their norms, and the output layer."""
    return {name: value for name, value in hf.named_parameters() if is_of_adapter(name) or name.startswith(HEAD)}


def write(folder: Path, hf: PreTrainedModel, language: str, labels: Mapping[str, int]) -> None:
    """The file of a language and its vocabulary, as they would lie in a folder of MMS."""
    folder.mkdir()
    weights = {name: value.detach().cpu().contiguous() for name, value in weights_of(hf).items()}
    save_file(weights, folder / LANGUAGE_FILES[0].format(language), metadata={"format": "pt"})
    (folder / "vocab.json").write_text(json.dumps({language: labels}, ensure_ascii=False, indent=1), encoding="utf-8")


def train_alone(model: "CTCModel") -> None:
    """Let the adapters, their norms and the output layer learn, and nothing else."""
    trained = set(weights_of(model.hf).values())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def _layers(hf: PreTrainedModel) -> list[Wav2Vec2AttnAdapterLayer]:
    return [module for module in hf.modules() if isinstance(module, Wav2Vec2AttnAdapterLayer)]
