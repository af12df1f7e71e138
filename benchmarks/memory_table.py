"""Memory of an update by seconds of audio in its micro-batch: computed, probed by the preflight, and measured.

    python benchmarks/memory_table.py [--sizes base large] [--seconds 10 20 40] [--precisions no] [--gpu_gb 16]

Clips of 10 s, wav2vec2-base and -large (group norm, feature encoder frozen, dropout 0.1 but in attention, where the
CPU's kernel has none), a process for each row. `computed` runs the same update on tensors without data and adds up what
is alive (the optimizer's moments, gradients and fp32 weights are `static`); `preflight` is what the check before step 1
found for the heaviest batch, `update` the peak of real updates, both beyond what the process held before. On a machine
without instructions for bf16 its rows are computed only.

The advice at the end is computed, not measured: the most seconds of audio in a micro-batch with which static, batch and
a margin (a GB for CUDA itself, a tenth of the rest for its allocator) stay within --gpu_gb.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

import numpy as np
import torch
from architectures import BASE, LARGE_960H
from noise_clips import write_noise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCTC

import train
from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from data import training_loader
from memory import PeakMemory, trim_memory, used_bytes
from model import CTCModel, optimizer_groups
from processes import start_processes
from run import Run

CLIP_SECONDS = 10
UPDATES = 3
CUDA_BYTES, ALLOCATOR_SHARE = 1e9, 0.1
SIZES = {"base": BASE, "large": {}}


def main() -> None:
    """A process for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seconds", nargs="+", type=int, default=[10, 20, 40])
    parser.add_argument("--precisions", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--gpu_gb", type=float, default=16.0)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        size, seconds, checkpointing = arguments.measure
        measure(size, int(seconds), checkpointing == "yes")
        return
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    print(f"{'':>6}{'batch':>8}{'recompute':>11}{'precision':>11}", end="")
    print(f"{'static':>9}{'computed':>10}{'preflight':>11}{'update, MB':>12}", flush=True)
    for size in arguments.sizes:
        for precision in arguments.precisions:
            for checkpointing in ("no", "yes"):
                for seconds in arguments.seconds:
                    static, batch = computed(size, seconds, checkpointing == "yes", precision == "bf16")
                    found = {"preflight": "", "update": ""}
                    if precision == "no" or has_bf16:
                        found = measured_apart(size, seconds, checkpointing, precision)
                    print(
                        f"{size:>6}{seconds:>6} s{checkpointing:>11}{precision:>11}{static / 1e6:>9,.0f}"
                        f"{batch / 1e6:>10,.0f}{found['preflight']:>11}{found['update']:>12}", flush=True,
                    )  # fmt: skip
    for size in arguments.sizes:
        for precision in arguments.precisions:
            for checkpointing in (False, True):
                most = most_seconds(size, checkpointing, precision == "bf16", arguments.gpu_gb * 1e9)
                print(
                    f"computed: {size} in {precision}, {'with' if checkpointing else 'without'} "
                    f"--gradient_checkpointing, fits {most} s of padded audio into {arguments.gpu_gb:g} GB", flush=True,
                )  # fmt: skip


# --- Computed ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, `now` and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        """Run the operation, and count what it made."""
        made = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def computed(size: str, seconds: int, checkpointing: bool, in_bf16: bool) -> tuple[int, int]:
    """Bytes that training holds always, and at most beyond them in an update, from an update on fake tensors."""
    fields = model_fields(size)
    kind = fields.pop("model_type")
    lengths = [CLIP_SECONDS * SAMPLE_RATE_HZ] * (seconds // CLIP_SECONDS)
    lengths[-1] -= len(lengths) > 1
    with FakeTensorMode(), LiveBytes() as live:
        model = CTCModel(AutoModelForCTC.from_config(AutoConfig.for_model(kind, **fields))).train()
        model.freeze_feature_encoder()
        if checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(optimizer_groups(model, 0.01), fused=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.zeros(sum(parameter.numel() for parameter in trained))  # As SharedGradients holds them.
        for parameter, piece in zip(trained, gradients.split([p.numel() for p in trained]), strict=True):
            parameter.grad = piece.view_as(parameter)
        optimizer.step()
        static = live.now
        live.peak = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            logits_BTV, _ = model(torch.zeros(len(lengths), lengths[0]), lengths)
        # The CTC loss itself has no version without data; it holds a few numbers per frame and label.
        logits_BTV.float().log_softmax(-1).sum().backward()
    return static, live.peak - static


def most_seconds(size: str, checkpointing: bool, in_bf16: bool, gpu_bytes: float) -> int:
    """Of padded audio in a micro-batch, in clips of 10 s; 0 where not even one fits. Memory grows evenly with clips."""
    room = (gpu_bytes - CUDA_BYTES) * (1 - ALLOCATOR_SHARE)
    (static, two), (_, four) = (computed(size, CLIP_SECONDS * clips, checkpointing, in_bf16) for clips in (2, 4))
    per_clip = (four - two) / 2
    clips = int((room - static - two) // per_clip) + 2
    if clips < 2:
        clips = int(static + computed(size, CLIP_SECONDS, checkpointing, in_bf16)[1] <= room)
    return CLIP_SECONDS * clips


# --- Measured ------------------------------------------------------------------------------------------------------


def measured_apart(size: str, seconds: int, checkpointing: str, precision: str) -> dict[str, str]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", size, str(seconds), checkpointing]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": precision}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {name: f"{number / 1e6:,.0f}" for name, number in json.loads(done.stdout.splitlines()[-1]).items()}


def measure(size: str, seconds: int, checkpointing: bool) -> None:
    """Print the bytes beyond those held before: of the preflight's heaviest batch, and at most in some updates."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        rows = seconds // CLIP_SECONDS
        # Lengths differ by a few samples, so that batches are padded.
        seconds_N = CLIP_SECONDS - np.arange(UPDATES * rows) / SAMPLE_RATE_HZ
        write_noise(folder / "data", {"train": seconds_N, "dev": seconds_N[:1]})
        config = TrainConfig(
            data_dir=str(folder / "data"), output_dir=str(folder / "run"), model_config=model_fields(size),
            vocabulary="large_960h", per_device_train_batch_size=rows, max_steps=UPDATES,
            gradient_checkpointing=checkpointing, per_device_eval_batch_size=1, do_predict=False, preflight="warn",
            dataloader_num_workers=0,
        )  # fmt: skip
        run = Run(config, start_processes([], config.output_dir))
        facts = next(finding.facts for finding in run.report.findings if finding.check == "memory training")
        loader = training_loader(
            run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, run.total_steps, run.num_workers
        )
        peaks = []
        for update in loader:
            trim_memory()
            held = used_bytes(run.accelerator.device)
            with PeakMemory(run.accelerator.device) as peak:
                train.train_step(run, update)
            peaks.append(peak.bytes - held)
        run.accelerator.end_training()
    print(json.dumps({"preflight": facts["peak_bytes"] - facts["base_bytes"], "update": max(peaks)}))


def model_fields(size: str) -> dict[str, object]:
    """Of wav2vec2-base or -large as released, with a head of 32; no layer left out and nothing masked."""
    still = {"attention_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    return LARGE_960H.recipe | SIZES[size] | still


if __name__ == "__main__":
    main()
