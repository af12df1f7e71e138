"""A new alphabet on a model that has one: its head grown for the new letters against a head drawn anew.

    python benchmarks/new_alphabet.py [--corpus ../shared/corpora/yo] [--model runs/demo]
        [--config configs/yoruba.yaml] [--max_steps 560] [--seeds 1] [--work_dir new_alphabet]

Trains --config twice for each seed, from the model of the run --model (the demo's, which is trained first when there
is none), with --head grow and with --head new; data, order and updates are the same. Prints dev loss and CER by step
and draws them into new_alphabet.png. Each run is a cell in --work_dir that is kept and resumed, so that the script goes
on where it stopped.
"""

import argparse
from pathlib import Path

import pandas as pd
from programs import REPOSITORY, run_program

HEADS = {"grow": "grown", "new": "drawn"}
FIGURES = {"eval_loss": "dev loss per label", "eval_cer": "dev CER"}


def main() -> None:
    """Train what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=REPOSITORY.parent / "shared" / "corpora" / "yo")
    parser.add_argument("--model", type=Path, default=REPOSITORY / "runs" / "demo")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "yoruba.yaml")
    parser.add_argument("--work_dir", type=Path, default=Path("new_alphabet"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--max_steps", type=int, default=560)
    arguments = parser.parse_args()
    if not arguments.corpus.is_dir():
        raise SystemExit(f"skipped: {arguments.corpus} is not here; name a corpus that prepare.py reads with --corpus")
    work = arguments.work_dir.resolve()
    data_dir = work / "data"
    run_program("prepare.py", "--corpus", arguments.corpus, "--data_dir", data_dir, log=work / "prepare.log")
    model = find_model(arguments.model, work)
    logs = {
        (head, seed): train(arguments, model, data_dir, work / f"{head}_seed_{seed}", head, seed)
        for seed in arguments.seeds
        for head in HEADS
    }
    print_table(logs)
    draw(logs, work / "new_alphabet.png")
    print(f"plot {work / 'new_alphabet.png'}, runs in {work}")


def find_model(run: Path, work: Path) -> Path:
    """The model of a finished run; without one the demo is trained."""
    if not (run / "train_results.json").is_file():
        run = work / "demo"
        demo = {"config": REPOSITORY / "configs" / "demo.yaml", "data_dir": work / "demo_data", "output_dir": run}
        run_program("train.py", *flags(**demo, resume_from_checkpoint="auto"), log=work / "demo.log")
    return run / "model"


def train(
    arguments: argparse.Namespace, model: Path, data_dir: Path, folder: Path, head: str, seed: int
) -> pd.DataFrame:
    """One run to its end. Returns its evaluations."""
    every = max(1, arguments.max_steps // 16)
    settings = {
        "config": arguments.config, "model_name_or_path": model, "data_dir": data_dir, "output_dir": folder,
        "head": head, "seed": seed, "max_steps": arguments.max_steps, "eval_steps": every, "logging_steps": every,
        "save_steps": arguments.max_steps // 4, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    run_program("train.py", *flags(**settings), log=folder.parent / f"{folder.name}.log")
    log = pd.read_csv(folder / "training_log.csv")
    return log[log["eval_loss"].notna()].set_index("step")


def flags(**settings: object) -> list[str]:
    """Settings as a command line has them."""
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def print_table(logs: dict[tuple[str, int], pd.DataFrame]) -> None:
    """A row per evaluation: loss and CER of each run."""
    cells = [(f"{HEADS[head]} {seed}", log) for (head, seed), log in logs.items()]
    print("head, seed  " + "".join(f"{name:>20}" for name, _ in cells))
    print("step        " + "".join(f"{'loss':>12}{'CER':>8}" for _ in cells))
    for step in cells[0][1].index:
        found = [log.loc[step] for _, log in cells]
        print(f"{step:<12}" + "".join(f"{row['eval_loss']:12.3f}{row['eval_cer']:8.1%}" for row in found))


def draw(logs: dict[tuple[str, int], pd.DataFrame], path: Path) -> None:
    """Both figures over the steps, a line for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, title) in zip(figure.subplots(1, 2), FIGURES.items(), strict=True):
        for (head, seed), log in logs.items():
            colour = f"C{list(HEADS).index(head)}"
            axes.plot(log.index, log[column], color=colour, label=f"head {HEADS[head]}, seed {seed}")
        axes.set(xlabel="updates", ylabel=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
