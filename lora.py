"""LoRA: low-rank additions to matrices of an encoder that stays as it is (https://arxiv.org/abs/2106.09685), by peft.

Training computes W x + scaling B (A dropout(x)). Evaluation multiplies by the merged matrix W + scaling B A, whose bits
are those that model/ holds: what is scored is what is saved, and nothing of LoRA is left in it.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from errors import UsageError

if TYPE_CHECKING:
    from levers import Adaptation
    from model import CTCModel

INSTALL = "pip install 'peft>=0.18'"
# peft keeps several additions under names; there is one here.
NAME = "default"
# Query and value projections, as in the paper; by family where they have other names.
DEFAULT_TARGETS = ("q_proj", "v_proj")
TARGETS_OF_FAMILY = {
    "wav2vec2-conformer": ("linear_q", "linear_v"),
    # Its attention hands the matrices themselves to torch, where an addition to the layer is not seen.
    "wavlm": ("intermediate_dense", "output_dense"),
}
UNREACHED = {"wavlm": ("q_proj", "k_proj", "v_proj", "out_proj")}


def train_alone(model: "CTCModel", settings: "Adaptation") -> None:
    """Add low-rank matrices, and let them and the output layer learn, nothing else. Draws from torch's generator.

    Raises:
        UsageError: peft is missing, or a matrix is named that the encoder does not have.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"--lora_rank needs the package peft, which is not installed: {INSTALL}") from error
    model.hf.requires_grad_(False)
    alpha = settings.lora_alpha or 2 * settings.lora_rank
    peft_config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=choose_targets(model, settings.lora_target_modules),
    )
    inject_adapter_in_model(peft_config, model.hf.base_model, NAME)
    model.peft_config = peft_config
    model.hf.lm_head.requires_grad_(True)
    for _, layer in _layers(model):
        layer.forward = functools.partial(_forward, layer, layer.forward)


def write(folder: Path, model: "CTCModel", base: str | None) -> None:
    """The additions and the output layer in peft's own format, for `PeftModel.from_pretrained`.

    Nothing where the additions are zero: a mean of merged models is none of low rank.

    Args:
        folder: to make.
        model: of `train_alone`.
        base: the name of the model that they were added to, where it is not a folder of this machine.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.hf.state_dict().items()}
    additions = {name: value for name, value in state.items() if ".lora_A." in name or ".lora_B." in name}
    if not any(bool(value.any()) for name, value in additions.items() if ".lora_B." in name):
        return
    additions = {name.replace(f".{NAME}.", "."): value for name, value in additions.items()}
    additions |= {name: value for name, value in state.items() if name.startswith("lm_head.")}
    dataclasses.replace(
        model.peft_config, base_model_name_or_path=base, modules_to_save=["lm_head"], inference_mode=True
    ).save_pretrained(folder)
    weights = {f"base_model.model.{name}": value for name, value in additions.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def choose_targets(model: "CTCModel", asked: Sequence[str]) -> list[str]:
    """The names of the matrices that get an addition.

    Raises:
        UsageError: a name that no matrix of the encoder has, or one whose layer is passed by.
    """
    family = model.hf.config.model_type
    names = {
        name.rpartition(".")[2] for name, module in model.hf.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    reached = sorted(names - set(UNREACHED.get(family, ())))
    for name in asked:
        if name in names and name not in reached:
            raise UsageError(
                f"--lora_target_modules {name}: the attention of {family} reads this matrix past its layer, so that an "
                f"addition has no effect; choose among {', '.join(reached)}"
            )
        if name not in names:
            nearest = difflib.get_close_matches(name, reached, n=1)
            hint = f"the nearest is {nearest[0]}" if nearest else f"there are {', '.join(reached)}"
            raise UsageError(f"--lora_target_modules {name}: this {family} encoder has no such matrix; {hint}")
    return list(asked or TARGETS_OF_FAMILY.get(family, DEFAULT_TARGETS))


def merged(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model by the names that they would have without LoRA; `state` where there is none.

    Args:
        model: whose `state_dict()` has the names of `state`.
        state: its weights, additions by themselves.
    """
    layers = dict(_layers(model))
    if not layers:
        return dict(state)
    without = {}
    for name, value in state.items():
        prefix, kind = _divide(name, layers)
        if kind == "weight":
            value = merged_weight(layers[prefix])
        if kind != "addition":
            without[name if prefix is None else f"{prefix}.{kind}"] = value
    return without


def divided(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other way round: weights without LoRA as the state of a model, whose additions are then zero."""
    layers = dict(_layers(model))
    if not layers:
        return dict(weights)
    state, left = {}, dict(weights)
    for name, value in model.state_dict().items():
        prefix, kind = _divide(name, layers)
        if kind == "addition":
            # B A is zero where B is.
            state[name] = torch.zeros_like(value) if ".lora_B." in name else value
        elif (plain := name if prefix is None else f"{prefix}.{kind}") in left:
            state[name] = left.pop(plain)
    return state | left


@torch.no_grad()
def merged_weight(layer: nn.Module) -> torch.Tensor:
    """W + scaling B A of one layer of peft, in the precision of the weights."""
    with torch.autocast(layer.base_layer.weight.device.type, enabled=False):
        return layer.base_layer.weight + layer.get_delta_weight(NAME)


def _forward(layer: nn.Module, in_training: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    if layer.training:
        return in_training(hidden)
    return F.linear(hidden, merged_weight(layer), layer.base_layer.bias)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # By what it has, so that peft need not be there.
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def _divide(name: str, layers: Mapping[str, nn.Module]) -> tuple[str | None, str | None]:
    """Of a weight's name the layer with LoRA, and there `weight` or `bias` of the base, or `addition`."""
    for middle, kind in ((".base_layer.", None), (".lora_A.", "addition"), (".lora_B.", "addition")):
        prefix, found, rest = name.partition(middle)
        if found and prefix in layers:
            return prefix, kind or rest
    return None, None
