"""What the loop costs beyond the model: train.py's updates against the bare forward, backward and optimizer step.

    python benchmarks/step_overhead.py [--sizes demo base] [--precisions fp32 bf16] [--updates 40]

Noise clips with Common Voice's distribution of lengths and random texts. A block of updates as train.py makes them
(loading, padding, loss, clipping, optimizer, counting), then transformers' own model with the same weights, AdamW, the
very same padded batches held in memory and its own loss, block by block in turn; masks and dropout are off, the feature
encoder is frozen in both. The ratio is that of the sums, and the goal is at most 1.03; below 1 our model is the faster.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import torch
import yaml
from architectures import BASE, LARGE_960H
from noise_clips import common_voice_seconds, write_noise
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

import train
from config import TrainConfig
from data import Batch, Update, training_loader
from processes import start_processes
from run import Run

BLOCK = 5
CLIPS = 240
OFF = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop",
     "mask_time_prob", "mask_feature_prob"), 0.0,
)  # fmt: skip
BATCH_SIZES = {"demo": 8, "base": 4}


def main() -> None:
    """A process for each size and precision, since the launcher's precision is a fact of a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(BATCH_SIZES), default=list(BATCH_SIZES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.sizes[0], arguments.updates)
        return
    print(f"{'size':>6}{'precision':>11}{'ours, s':>9}{'bare, s':>9}{'ratio':>7}{'waiting for data':>18}", flush=True)
    for size in arguments.sizes:
        for precision in arguments.precisions:
            command = [sys.executable, __file__, "--one", "--sizes", size, "--updates", str(arguments.updates)]
            environment = os.environ | {"ACCELERATE_MIXED_PRECISION": {"fp32": "no"}.get(precision, precision)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["ours"] / found["bare"]
            print(
                f"{size:>6}{precision:>11}{found['ours']:>9.3f}{found['bare']:>9.3f}{ratio:>7.3f}{found['data']:>17.1%}",
                flush=True,
            )


def measure(size: str, updates: int) -> None:
    """Print the mean seconds of an update: ours, bare, and our share of waiting for data."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        write_noise(folder / "data", {"train": common_voice_seconds(CLIPS), "dev": common_voice_seconds(4)})
        config = TrainConfig(
            data_dir=str(folder / "data"), output_dir=str(folder / "run"), model_config=model_config(size),
            vocabulary="large_960h", per_device_train_batch_size=BATCH_SIZES[size], max_steps=updates + 2 * BLOCK,
        )  # fmt: skip
        run = Run(config, start_processes([], config.output_dir))
        bare = Bare(run)
        loader = training_loader(
            run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, run.total_steps,
            run.num_workers,
        )  # fmt: skip
        ours, theirs, data = compare(run, bare, run.clock.waiting(loader), updates)
        run.accelerator.end_training()
    print(json.dumps({"ours": ours / updates, "bare": theirs / updates, "data": data / ours}))


def compare(run: Run, bare: "Bare", loader: Iterator[Update], updates: int) -> tuple[float, float, float]:
    """Seconds of all updates: ours, bare, and waiting for data in ours. The first two blocks only warm up."""
    ours = theirs = data_before = 0.0
    for block in range(updates // BLOCK + 2):
        if block == 2:
            ours = theirs = 0.0
            data_before = run.clock.spent["data"]
        batches = []
        started_at = time.perf_counter()
        for _ in range(BLOCK):
            update = next(loader)
            with run.clock.phase("compute"):
                loss_sum, grad_norm = train.train_step(run, update)
            run.state.step += 1
            run.meter.add(update, loss_sum, grad_norm)
            batches += update.micro_batches
        ours += time.perf_counter() - started_at
        started_at = time.perf_counter()
        for batch in batches:
            bare.step(batch)
        theirs += time.perf_counter() - started_at
    return ours, theirs, run.clock.spent["data"] - data_before


class Bare:
    """transformers' model and loss with AdamW, in the precision of the run."""

    def __init__(self, run: Run) -> None:
        self.accelerator = run.accelerator
        self.model = Wav2Vec2ForCTC(Wav2Vec2Config.from_dict(run.hf_config.to_dict())).train()
        self.model.load_state_dict(run.model.hf.state_dict())
        self.model.freeze_feature_encoder()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(self, batch: Batch) -> None:
        """One update on one batch."""
        lengths_B = batch.sample_lengths_B
        mask_BS = (torch.arange(batch.input_values_BS.shape[1]) < lengths_B[:, None]).long()
        labels_BL = torch.nn.utils.rnn.pad_sequence(
            batch.labels_L.split(batch.label_lengths_B.tolist()), batch_first=True, padding_value=-100
        )
        self.optimizer.zero_grad()
        with self.accelerator.autocast():
            loss = self.model(batch.input_values_BS, attention_mask=mask_BS, labels=labels_BL).loss
        loss.backward()
        self.optimizer.step()


def model_config(size: str) -> dict[str, object]:
    """Of the demo, or of wav2vec2-base."""
    if size == "demo":
        recipe = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text(encoding="utf-8"))
        return recipe["model_config"] | OFF
    return LARGE_960H.recipe | BASE | OFF


if __name__ == "__main__":
    main()
