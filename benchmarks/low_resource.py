"""What a run costs by what it trains: everything, all but the feature encoder, attention adapters alone, LoRA alone.

    python benchmarks/low_resource.py [--architecture xls_r_300m] [--ways full encoder adapters lora] [--seconds 10]

A checkpoint of the real size with random weights is written in Hugging Face's format, and read by a process for each
row. `held` is what training holds always (weights, gradients, moments), `peak` the most in real updates of one clip,
both beyond what the process held before it read the model; fp32, no dropout, a CPU. Frozen weights count: on a CPU they
would stay in the mapped file, on a GPU they are in its memory. `checkpoint` and `model/` are sizes on the disk.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

import numpy as np
from architectures import XLS_R_300M, shrink, write_published_like_checkpoint
from noise_clips import write_noise
from torch import nn

with contextlib.suppress(ImportError):  # Imported late by the run: its size is not that of LoRA.
    import peft  # noqa: F401

import train
from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from data import training_loader
from memory import PeakMemory, trim_memory, used_bytes
from model import parameter_counts
from processes import start_processes
from run import Run
from sharding import weights_of

UPDATES = 2
ARCHITECTURES = {"xls_r_300m": XLS_R_300M, "small": shrink(XLS_R_300M)}
WAYS = {
    "full": {"freeze_feature_encoder": False},
    "encoder": {},  # all but the feature encoder
    "adapters": {"train_adapters": True},
    "lora": {"lora_rank": 8, "lora_alpha": 16},
}
# No layer left out, nothing masked, no dropout, whose masks would differ in size.
STILL = dict.fromkeys(
    ("attention_dropout", "hidden_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop", "mask_time_prob"),
    0.0,
)


def main() -> None:
    """A process for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="xls_r_300m")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, checkpoint = arguments.measure
        print(json.dumps(measure(way, Path(checkpoint), arguments.seconds, arguments.gradient_checkpointing)))
        return
    print(f"{'':>9}{'trained':>13}{'of all':>9}{'held':>9}{'peak':>9}{'checkpoint':>12}{'model/, MB':>12}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_published_like_checkpoint(checkpoint, ARCHITECTURES[arguments.architecture], "safetensors")
        for way in arguments.ways:
            found = measured_apart(way, checkpoint, arguments)
            sizes = "".join(
                f"{found[name] / 1e6:>{width},.1f}"
                for name, width in (("held", 9), ("peak", 9), ("checkpoint", 12), ("model", 12))
            )
            share = found["trained"] / found["parameters"]
            print(f"{way:>9}{found['trained']:>13,}{share:>9.2%}{sizes}", flush=True)


def measured_apart(way: str, checkpoint: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", way, str(checkpoint), "--seconds", str(arguments.seconds)]
    command += ["--gradient_checkpointing"] * arguments.gradient_checkpointing
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, checkpoint: Path, seconds: float, recomputes: bool) -> dict[str, int]:
    """Parameters, bytes in memory beyond those before the model was read, and bytes on the disk."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        seconds_N = seconds - np.arange(UPDATES) / SAMPLE_RATE_HZ
        write_noise(folder / "data", {"train": seconds_N, "dev": seconds_N[:1]})
        config = TrainConfig(
            data_dir=str(folder / "data"), output_dir=str(folder / "run"), model_name_or_path=str(checkpoint),
            model_overrides=STILL, vocabulary="large_960h", per_device_train_batch_size=1, max_steps=UPDATES,
            max_duration_in_seconds=seconds, per_device_eval_batch_size=1, do_predict=False, preflight="warn",
            dataloader_num_workers=0, gradient_checkpointing=recomputes, **WAYS[way],
        )  # fmt: skip
        accelerator = start_processes([], config.output_dir)
        trim_memory()
        before = used_bytes(accelerator.device)
        run = Run(config, accelerator)
        own_memory(run.model)
        trim_memory()
        held, peaks = used_bytes(accelerator.device), []
        loader = training_loader(
            run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, run.total_steps, run.num_workers
        )
        for update in loader:
            trim_memory()
            with PeakMemory(accelerator.device) as peak:
                train.train_step(run, update)
            peaks.append(peak.bytes)
            run.state.step += 1
        run.save_checkpoint()
        # Without opening it in a clean process, which would take the memory of another model.
        run.save_model(run.folder / "model", weights_of(run.model))
        trained, frozen = parameter_counts(run.model)
        (saved,) = (run.folder / "checkpoints").iterdir()
        sizes = {"checkpoint": bytes_below(saved), "model": bytes_below(run.folder / "model")}
        accelerator.end_training()
    memory = {"held": held - before, "peak": max(peaks) - before}
    return {"trained": trained, "parameters": trained + frozen} | memory | sizes


def own_memory(model: nn.Module) -> None:
    """Take the weights out of the mapped file that they were read from."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def bytes_below(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
