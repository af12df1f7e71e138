"""FSDP: weights, gradients and moments divided among the processes, for models that do not fit on one GPU.

The launcher asks for it (configs/launch/fsdp.yaml); torch's `fully_shard` does it, layer by layer, on GPUs and, for
tests, on CPUs. Weights stay in fp32 and updates are those of the undivided run: gradients are summed, not averaged, and
autocast decides the precision. Every pass through the model is an exchange, so all processes must make as many.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import lora
from errors import UsageError

if TYPE_CHECKING:
    from model import CTCModel

# The logits are a view, which nobody writes into.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# Of CTCModel's names, before those of transformers.
PREFIX = "hf."
# What else the launcher can ask for, with the value that this program does, and what to do instead.
REQUIRED = {
    "FSDP_VERSION": ("2", "fsdp_version: 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params: false, and more processes"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "--gradient_checkpointing behind train.py"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "fsdp_state_dict_type: FULL_STATE_DICT, which every loader reads"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading: false"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
}


def asks_for_sharding() -> bool:
    """Whether the launcher does."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def check_sharding_settings(precision: str) -> None:
    """What the launcher's FSDP settings ask for is done, or refused.

    Raises:
        UsageError: a setting that would be ignored.
    """
    for name, (wanted, remedy) in REQUIRED.items():
        found = os.environ.get(name, wanted)
        if found.lower() != wanted.lower():
            raise UsageError(f"the launcher asks for {name} {found}, which this program does not do: set {remedy}")
    if precision == "fp16":
        raise UsageError("FSDP with mixed precision fp16 is not supported: launch with --mixed_precision bf16 or no")


def shard(model: "CTCModel", accelerator: Accelerator) -> None:
    """Divide the model among all processes, in place: each layer of the encoder by itself, then the rest.

    Before the optimizer is made, whose parameters are the divided ones.

    Raises:
        UsageError: the model drops layers, each process others.
    """
    hf_config = model.hf.config
    if getattr(hf_config, "layerdrop", 0.0) > 0:
        raise UsageError(
            f"FSDP with layerdrop {hf_config.layerdrop}: processes that drop different layers cannot share them; set "
            "layerdrop: 0.0 under model_config"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.hf.base_model.encoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=_gives_back_after_forward())
    fully_shard(model, mesh=mesh)
    for module in _sharded_modules(model):
        # By default gradients are averaged; the loss is divided by the labels of all processes already.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is divided among the processes."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights on every process while the block runs, which then may pass as many batches as it likes, or none.

    Entered and left by all processes alike. Does nothing for a model that is not divided.
    """
    modules = _sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            # The outermost keeps its weights for the backward pass that follows at once, as torch has it.
            module.set_reshard_after_forward(module is not model and _gives_back_after_forward(), recurse=False)


def gather_tensors(tensors: Mapping[str, torch.Tensor], is_first: bool) -> dict[str, torch.Tensor]:
    """Divided tensors made whole, one at a time, in the first process' memory; others get none of them.

    Called by all processes alike. Tensors that are not divided are passed on.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().cpu() if is_first else tensor.full_tensor()
        if is_first:
            gathered[name] = tensor
    return gathered


def like(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """This process' piece of a whole tensor, divided as `own` is; without an exchange, since every process has it."""
    if not isinstance(own, DTensor) or tensor.shape != own.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def weights_of(model: "CTCModel") -> dict[str, torch.Tensor]:
    """The weights by Hugging Face's names, LoRA merged; of a divided model this process' pieces."""
    return lora.merged(model.hf, state_of(model))


def load_weights(model: "CTCModel", weights: Mapping[str, torch.Tensor]) -> None:
    """Whole weights, by Hugging Face's names, into a model that may be divided. LoRA's additions become zero.

    Raises:
        RuntimeError: names or shapes differ (torch's).
    """
    load_state(model, lora.divided(model.hf, weights))


def state_of(model: "CTCModel") -> dict[str, torch.Tensor]:
    """The weights in memory, LoRA's additions by themselves; of a divided model this process' pieces."""
    # Asked of the model itself: that is where a divided one gives back what it has gathered.
    return {name.removeprefix(PREFIX): tensor for name, tensor in model.state_dict().items()}


def load_state(model: "CTCModel", weights: Mapping[str, torch.Tensor]) -> None:
    """What `state_of` gave, made whole.

    Raises:
        RuntimeError: names or shapes differ (torch's).
    """
    own = state_of(model)
    pieces = {name: like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()}
    model.load_state_dict({PREFIX + name: tensor for name, tensor in pieces.items()})


class ShardedGradients:
    """The gradients of a divided model, which each backward pass sums over the processes.

    Attributes:
        parameters: what is trained.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._spoil = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:  # so that the optimizer can make its moments
            parameter.grad = torch.zeros_like(parameter)

    def zero(self) -> None:
        """Forget the last update."""
        for parameter in self.parameters:
            parameter.grad = None

    def sum_over_processes(self, accelerator: Accelerator, loss: torch.Tensor) -> torch.Tensor:
        """The loss summed over the ranks; the gradients have been in the backward passes.

        A loss that is not finite makes the norm of `clip` NaN, should it not be: such an update is left out.
        """
        loss = accelerator.reduce(loss.reshape(1), reduction="sum")[0]
        self._spoil = 0.0 * loss
        return loss

    def clip(self, _: Accelerator, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to this norm over all processes; the norm that they had."""
        return nn.utils.clip_grad_norm_(self.parameters, max_norm).full_tensor() + self._spoil


def _gives_back_after_forward() -> bool:
    """False keeps a layer's weights until its backward pass: less to send, more memory."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
