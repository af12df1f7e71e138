"""Pre-train a wav2vec 2.0 encoder on untranscribed speech, from a released checkpoint or from random weights.

    python prepare.py --corpus recordings/ --data_dir data/radio --untranscribed
    accelerate launch pretrain.py --model_name_or_path facebook/wav2vec2-xls-r-300m --data_dir data/radio \\
        --output_dir runs/radio
    accelerate launch train.py --model_name_or_path runs/radio/model --vocabulary train --data_dir data/yo ...

Shards that have texts serve as well; the texts are not looked at. Loop, resume, precision and processes are train.py's.
"""

from errors import RunFailed, exit_status

# isort: split

import allocator  # noqa: F401 - before torch
import collector  # before torch
import launched  # noqa: F401 - before torch

# isort: split

import sys

from clock import describe_cost
from config import PretrainConfig, parse_arguments
from pretraining_run import PretrainingRun
from progress import Progress, format_seconds
from train import conduct, train

collector.wake()


def main() -> None:
    """The command."""
    config = parse_arguments(PretrainConfig, sys.argv[1:], __doc__)
    conduct(config, PretrainingRun, pretrain, may_shard=False)


def pretrain(run: PretrainingRun) -> None:
    """The updates, and what came out."""
    train(run, evaluate, evaluate)
    finish(run)


def evaluate(run: PretrainingRun, progress: Progress) -> None:
    """What the loop does at --eval_steps."""
    run.evaluate(progress)


def finish(run: PretrainingRun) -> None:
    """Write train_results.json and say what came out, and how to go on."""
    if run.state.best_step is None:
        raise RunFailed(
            f"no evaluation of {run.folder} had enough codes in use to be kept, so there is no model/: begin again "
            "with a lower --learning_rate, longer --warmup_steps or larger updates"
        )
    results = run.training_results()
    run.best.load()
    run.best.check()
    if run.is_main:
        results |= run.cost()
        run.write_results(results)
        folder = run.folder
        lines = [
            "",
            f"finished: {run.state.step} updates in {format_seconds(results['train_runtime'])} of training",
            f"  dev loss, best at step {run.state.best_step}   {run.state.best_metric:.4f}",
            f"  {describe_cost(results)}",
            f"  log {folder / 'training_log.csv'}, plot {folder / 'training_curve.png'}, model {folder / 'model'}",
            f"fine-tune it: accelerate launch train.py --model_name_or_path {folder / 'model'} --vocabulary train "
            "--data_dir DATA --output_dir RUN",
        ]
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
