"""Where does a NaN come from when a model is trained in bf16 on the CPU? Names the operation; see docs/bf16_on_cpu.md.

    python prepare.py --corpus demo --data_dir data/demo
    python benchmarks/bf16_nan.py operations                  single operations, half a minute
    python benchmarks/bf16_nan.py training --seeds 0 1 2      the prototype and this project's model, with a watch

`training` looks at the inputs and outputs of every ATen operation, forward and backward, and prints the first one that
makes NaN or +inf of finite inputs. As in train.py, an update with a non-finite gradient is left out.

Without bf16 instructions an update takes four times as long. `--emulate` computes products and convolutions in fp32
and rounds their results to bf16, as the instructions do; what it cannot show is a fault of the kernels that use them.

Dimension letters: B utterances, S samples, T frames, V vocabulary, L labels.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import ShardDataset
from model import CTCModel, ctc_loss_sum
from text import LARGE_960H_VOCABULARY

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.convolution.default, aten.convolution_backward.default,
}  # fmt: skip
# What these return was not computed; it is the poison.
NOT_COMPUTED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# As the prototype that became NaN: 1.9 million parameters, group norm behind the first convolution, no dropout.
PROTOTYPE = {
    "vocab_size": 32, "pad_token_id": 0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
    "conv_dim": [32, 64, 128, 192, 192], "conv_kernel": [10, 8, 4, 4, 4], "conv_stride": [5, 4, 4, 2, 2],
    "feat_extract_norm": "group", "conv_bias": False, "do_stable_layer_norm": False, "hidden_size": 192,
    "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
BATCH_SIZE = 16
WARMUP_STEPS = 200


class Watch(TorchDispatchMode):
    """Remembers the first operation that makes NaN or +inf of finite inputs.

    -inf is left alone: it is how masks and CTC's impossible paths are written.
    """

    def __init__(self, emulate: bool) -> None:
        super().__init__()
        self.emulate = emulate
        self.found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self.emulate and func in PRODUCTS and any(tensor.dtype == torch.bfloat16 for tensor in inputs):
            precise = tree_map(_converted(torch.bfloat16, torch.float32), args)
            result = tree_map(_converted(torch.float32, torch.bfloat16), func(*precise, **kwargs))
        else:
            result = func(*args, **kwargs)
        if self.found is None and func.overloadpacket.__name__ not in NOT_COMPUTED:
            # Beside the loss CTC returns path scores, of which it never writes those behind a row's labels.
            returned = result[0] if func is aten._ctc_loss.Tensor or func is aten._ctc_loss.default else result
            outputs = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
            if any(map(_is_bad, outputs)) and not any(map(_is_bad, inputs)):
                shapes = ", ".join(f"{str(one.dtype)[6:]}{list(one.shape)}" for one in inputs)
                self.found = f"{func} of {shapes}"
        return result


def _converted(old: torch.dtype, new: torch.dtype) -> Callable[[object], object]:
    return lambda leaf: leaf.to(new) if isinstance(leaf, Tensor) and leaf.dtype == old else leaf


def _is_bad(tensor: Tensor) -> bool:
    # A sum is enough for most: it is finite only if nothing in it is NaN or infinite.
    if not tensor.is_floating_point() or not tensor.numel() or bool(tensor.sum(dtype=torch.float32).isfinite()):
        return False
    return bool((tensor.isnan() | (tensor == float("inf"))).any())


# --- Training ------------------------------------------------------------------------------------------------------


def batches(data_dir: Path, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Random padded batches for ever: input_values_BS, sample_lengths_B, labels_flat, label_lengths_B."""
    dataset, rng = ShardDataset(data_dir / "train"), np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(dataset))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = [dataset[int(row)] for row in order[start : start + BATCH_SIZE]]
            audio = [torch.from_numpy(row.audio.astype(np.float32) / 32_768) for row in rows]
            audio = [(one - one.mean()) / (one.var() + 1e-7).sqrt() for one in audio]
            labels = [
                torch.tensor([LARGE_960H_VOCABULARY["|" if c == " " else c] for c in row.text.upper()]) for row in rows
            ]
            yield (
                nn.utils.rnn.pad_sequence(audio, batch_first=True),
                torch.tensor([len(one) for one in audio]),
                torch.cat(labels),
                torch.tensor([len(one) for one in labels]),
            )


def loss_of(kind: str, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Loss of a batch: `prototype` as transformers computes it, `project` as train.py does."""
    input_values_BS, sample_lengths_B, labels_flat, label_lengths_B = batch
    if kind == "project":
        logits_BTV, frame_lengths_B = model(input_values_BS, sample_lengths_B)
        return ctc_loss_sum(logits_BTV, frame_lengths_B, labels_flat, label_lengths_B, 0).sum() / len(labels_flat)
    valid_BS = torch.arange(input_values_BS.shape[1]) < sample_lengths_B[:, None]
    labels_BL = nn.utils.rnn.pad_sequence(labels_flat.split(label_lengths_B.tolist()), True, -100)
    attention_mask = valid_BS.long() if kind == "prototype" else None
    return model(input_values_BS, attention_mask=attention_mask, labels=labels_BL).loss


def train(kind: str, seed: int, learning_rate: float, arguments: argparse.Namespace) -> None:
    """Train one model from random weights and print its row of the table."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(seed)
    np.random.seed(seed)
    hf = Wav2Vec2ForCTC(Wav2Vec2Config(**PROTOTYPE)).train()
    model = CTCModel(hf).train() if kind == "project" else hf
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    watch, left_out, losses, started_at = Watch(arguments.emulate), 0, [], time.perf_counter()
    for step, batch in zip(range(arguments.updates), batches(arguments.data_dir, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.zero_grad()
        with watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=not arguments.fp32):
                loss = loss_of(kind, model, batch)
            loss.backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizer.step()
        else:
            left_out += 1
            print(
                f"    update {step}: loss {loss.item():.3f}, gradient not finite, first made by {watch.found}",
                flush=True,
            )
            watch.found = None
        losses.append(loss.item())
    print(
        f"{kind:<18} {'fp32' if arguments.fp32 else 'bf16'} {learning_rate:<7g} {seed:>4} {arguments.updates:>7} "
        f"{left_out:>8} {np.mean(losses[-10:]):>9.3f} {time.perf_counter() - started_at:>7.0f}  "
        f"{watch.found or '-'}",
        flush=True,
    )


# --- Single operations ---------------------------------------------------------------------------------------------


def operations() -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Name, function and inputs of what the prototype computes, at its sizes and at the edges of its data."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def parameter(*shape: int, scale: float = 1.0) -> Tensor:
        return draw(*shape, scale=scale, dtype=torch.float32)

    def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 192, weight, bias)

    affine = [parameter(192), parameter(192)]
    for scale in (1e-4, 1, 100):
        yield f"group norm, T 6399, scale {scale:g}", group_norm, [draw(4, 192, 6399, scale=scale), *affine]
    silent = draw(4, 192, 1599)
    silent[0], silent[1, :, 100:], silent[2] = 0, 0, 1
    yield "group norm, silence, padding, constant", group_norm, [silent, *affine]
    for scale in (1, 1e4, 1e30):
        yield f"GELU, scale {scale:g}", F.gelu, [draw(100_001, scale=scale)]
    for name, x in (("", draw(4, 77, 192)), (", zeros", torch.zeros(4, 77, 192, dtype=torch.bfloat16))):
        yield f"layer norm{name}", lambda x, weight, bias: F.layer_norm(x, (192,), weight, bias), [x, *affine]
    for channels, kernel, stride, length in ((1, 10, 5, 9000), (192, 8, 4, 1799), (192, 4, 2, 111)):
        yield (
            f"convolution {channels} to 192, kernel {kernel}",
            lambda x, weight, stride=stride: F.conv1d(x, weight, stride=stride),
            [draw(2, channels, length), parameter(192, channels, kernel, scale=0.05)],
        )
    yield (
        "positional convolution, transposed input",
        lambda x, weight: F.conv1d(x.transpose(1, 2), weight, padding=16, groups=8),
        [draw(2, 49, 192), parameter(192, 24, 32, scale=0.05)],
    )
    for scale in (0.02, 1e-20):
        inputs = [parameter(192, 24, 32, scale=scale), parameter(1, 1, 32)]
        yield f"weight norm, scale {scale:g}", lambda v, g: torch._weight_norm(v, g, 2), inputs
    for frames in (17, 49, 77, 300):
        qkv = [draw(4, frames, 4, 48).transpose(1, 2) for _ in range(3)]
        yield f"attention, T {frames}", F.scaled_dot_product_attention, qkv
        valid = torch.arange(frames) < torch.tensor([frames, frames - 3, frames // 2, 0])[:, None]
        mask = valid[:, None, None].expand(4, 1, frames, frames)
        yield f"attention, T {frames}, one row all padding", F.scaled_dot_product_attention, [*qkv, mask]
    fp32_minimum = torch.zeros(4, 1, frames, frames).masked_fill(~mask, torch.finfo(torch.float32).min)
    yield (
        "softmax by hand, all padding, fp32's minimum",
        lambda q, k, v: (q @ k.transpose(2, 3) / 7 + fp32_minimum.to(q.dtype)).softmax(-1).to(q.dtype) @ v,
        qkv,
    )
    for width in (33, 48, 192):
        yield f"linear, {width} inputs", F.linear, [draw(301, width), parameter(512, width)]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Output and gradients, for a gradient of the output drawn from a fixed seed."""
    leaves = [
        one.to(precision if one.dtype == torch.bfloat16 else one.dtype).detach().requires_grad_()
        if one.is_floating_point() else one
        for one in inputs
    ]  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = function(*leaves)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())]


def leaks_through_tail() -> bool:
    """The snippet of oneDNN issue 5717: does NaN in some rows of a product reach the rows without NaN?"""
    left = torch.full((16, 32, 33), float("nan"), dtype=torch.bfloat16)
    left[:, 0] = 1
    return bool(torch.bmm(left, torch.ones(16, 33, 64, dtype=torch.bfloat16))[:, 0].isnan().any())


def check_operations() -> None:
    """Print for each operation whether output and gradients are finite, and their distance from fp32."""
    print(f"{'operation':<48} {'bf16':<8} {'fp32':<8} relative difference")
    for name, function, inputs in operations():
        in_bf16, in_fp32 = (gradients(function, inputs, dtype) for dtype in (torch.bfloat16, torch.float32))
        finite = ["finite" if all(one.isfinite().all() for one in some) else "NaN" for some in (in_bf16, in_fp32)]
        difference = max(
            float((one.float() - other).norm() / other.norm().clamp(min=1e-20))
            for one, other in zip(in_bf16, in_fp32, strict=True)
        )
        print(f"{name:<48} {finite[0]:<8} {finite[1]:<8} {difference:.1e}", flush=True)
    print(f"{'product, NaN in other rows (oneDNN#5717)':<48} {'leaks' if leaks_through_tail() else 'no leak'}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["operations", "training"])
    parser.add_argument("--data_dir", type=Path, default=Path("data/demo"))
    parser.add_argument("--kinds", nargs="+", default=["prototype", "project"],
                        choices=["prototype", "prototype-no-mask", "project"])  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--updates", type=int, default=150, help="two epochs of the demo corpus by default")
    parser.add_argument("--emulate", action="store_true", help="products in fp32, rounded to bf16")
    parser.add_argument("--fp32", action="store_true", help="the same without autocast")
    parser.add_argument("--no_poison", action="store_true", help="do not fill fresh memory with NaN")
    arguments = parser.parse_args()
    # A kernel that reads memory it did not write then shows it at once, not once in a thousand updates.
    torch.use_deterministic_algorithms(not arguments.no_poison, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = not arguments.no_poison
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in _processor_flags()]
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
          f"bf16 instructions: {', '.join(has) or 'none'}, {platform.machine()}")  # fmt: skip
    if arguments.what == "operations":
        check_operations()
        return
    if not (arguments.data_dir / "prepare.json").exists():
        print(f"skipped: {arguments.data_dir} is missing, run python prepare.py --corpus demo --data_dir data/demo")
        return
    print("model              dtype lr     seed updates left_out mean_loss seconds  first NaN or inf made by")
    for learning_rate in arguments.learning_rates:
        for seed in arguments.seeds:
            for kind in arguments.kinds:
                train(kind, seed, learning_rate, arguments)


def _processor_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
