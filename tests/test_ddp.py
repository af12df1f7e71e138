"""Several processes over gloo: equal updates, each utterance scored once, one writer, exits without a trace.

Started as a script this file is a server of ranks: it imports the program once, and forks as many processes as it is
asked for, each of which runs train.py's `main` as the launcher would (importing costs 8 s a process otherwise). The
real launcher is tested at the end.
"""

import contextlib
import csv
import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from architectures import XLS_R_300M, shrink, write_published_like_checkpoint
from conftest import (
    REPOSITORY,
    TALKATIVE,
    TINY_GROUP_NORM_MODEL,
    TINY_MODEL,
    check_in_this_process,
    make_rows,
    write_part,
    write_recipe,
)
from safetensors.torch import load_file
from test_prepare import write_corpus
from test_pretrain import write_pretraining_recipe
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import decoding
import roundtrip
from checkpoint import find_damage, list_checkpoints
from clock import PHASE_COLUMNS

SECONDS_FOR_A_RUN = 120
HANG_SECONDS = 12
OUTPUT_FLAGS = {"train": "output_dir", "pretrain": "output_dir", "evaluate": "output_dir", "prepare": "data_dir"}
# What a run imports, some of it late: once for all ranks.
COSTLY_MODULES = (
    "train", "torch._dynamo", "transformers.models.wav2vec2.modeling_wav2vec2", "transformers.pipelines", "pandas",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip
MASKS = {"mask_time_prob": 0.4, "mask_time_length": 2, "mask_feature_prob": 0.3, "mask_feature_length": 4}
MEASURED_COLUMNS = [
    "samples_per_second", "audio_seconds_per_second", "eval_runtime", "peak_memory_mb", "elapsed_seconds",
    *PHASE_COLUMNS,
    "padding_fraction",
]  # fmt: skip


# --- The server of ranks -------------------------------------------------------------------------------------------


def serve() -> None:
    """For each line on stdin: run the asked number of ranks, answer with their exit statuses."""
    for module in COSTLY_MODULES:
        importlib.import_module(module)
    roundtrip.check_in_clean_process = check_in_this_process
    gc.freeze()  # Ranks that do not touch what they share do not copy it.

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ranks = [_fork_rank(rank, request) for rank in range(request["num_processes"])]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        print(json.dumps(statuses), flush=True)


def _fork_rank(rank: int, request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    folder = Path(request["folder"])
    signal.alarm(SECONDS_FOR_A_RUN)  # A rank that hangs is a failure, and leaves no process behind.
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank_{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["num_processes"]),
        "LOCAL_WORLD_SIZE": str(request["num_processes"]), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(request["port"]), "ACCELERATE_MIXED_PRECISION": "no",
        **request["launcher"],
    }  # fmt: skip
    sys.argv = [f"{request['program']}.py", *request["arguments"]]
    failure = request["failure"] if request["failure"] and request["failure"]["rank"] == rank else None
    if request["program"] == "prepare":
        _note_parts(folder / f"rank_{rank}.parts", failure)
    if request["program"] not in ("train", "pretrain"):
        from errors import exit_status

        sys.exit(exit_status(importlib.import_module(request["program"]).main))
    # The interpreter ends as it does for a user: that is where processes without end_training abort (trap 8).
    command = importlib.import_module(request["program"]).main
    sys.exit(_run_rank(command, folder / f"rank_{rank}.pt", request["stop_at"], failure, request["counts_exchanges"]))


def _note_parts(path: Path, failure: dict | None) -> None:
    """Write down which parts this rank makes; a failure ends it in the midst of its part of that number."""
    import prepare

    original = prepare.new_part

    @contextlib.contextmanager
    def new_part(folder: Path) -> Iterator[Path]:
        with original(folder) as unfinished:
            with path.open("a") as file:
                file.write(f"{folder.parent.name}/{folder.name}\n")
            yield unfinished
            if failure and len(path.read_text().splitlines()) == failure["part"]:
                os._exit(9)

    prepare.new_part = new_part


def _inject(failure: dict) -> None:
    """Make this rank fail, in the forward or backward pass of these micro-batches of an update or an evaluation.

    `where` is one of those two passes (memory runs out), end, hang, or the name of a signal that is sent; or else
    probe or save, which fail whenever they are called.
    """
    import train

    if failure["where"] == "probe":
        _limit_rows(failure["rows"])
    if failure["where"] == "save":
        roundtrip.check_in_clean_process = lambda *_: [roundtrip.Failure("logits", "different by 3", "at most 0.0001")]
    if failure["where"] == "measure":
        _run_out_of_memory_once_while_measuring()
    original, passes = train.Run.forward, itertools.count()

    def is_due(run: train.Run) -> bool:
        is_place = run.model.training != failure.get("evaluating", False) and run.state.step == failure["step"]
        return is_place and next(passes) in failure["passes"]

    def forward(run: train.Run, batch: train.Batch) -> tuple[torch.Tensor, ...]:
        outputs = original(run, batch)
        if is_due(run):
            if failure["where"] == "end":
                os._exit(9)
            if failure["where"] == "hang":
                time.sleep(HANG_SECONDS)
                os._exit(9)
            if failure["where"].startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, failure["where"]))
            if failure["where"] == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.99 GiB")
            if failure["where"] == "nan":
                outputs = (*outputs[:2], outputs[2] * float("nan"))
            if failure["where"] == "backward":
                outputs[2].register_hook(_run_out_of_memory)
        return outputs

    train.Run.forward = forward


def _run_out_of_memory_once_while_measuring() -> None:
    """In the pass of pretrain.py before an update."""
    from data import PaddedBatch
    from pretraining import PretrainingModel

    original, calls = PretrainingModel.code_prob_sum, itertools.count()

    def measure(model: PretrainingModel, batch: PaddedBatch) -> torch.Tensor:
        if len(batch.ids) > 1 and next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.99 GiB")
        return original(model, batch)

    PretrainingModel.code_prob_sum = measure


def _limit_rows(rows: int) -> None:
    """In a probe, no more than so many rows fit on this rank."""
    import memory
    import preflight

    original = memory.probe

    def run_pass(passes: object, shape: memory.Shape, *arguments: object) -> memory.Probe:
        found = original(passes, shape, *arguments)
        return memory.Probe(shape, found.peak_bytes, found.fits and shape.rows < rows)

    preflight.probe = run_pass


def _run_out_of_memory(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.99 GiB")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Exchanges(TorchDispatchMode):
    """Notes every collective operation, and the passes between them, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: torch._ops.OpOverload, _: object, arguments: tuple = (), settings: dict | None = None
    ) -> object:
        if function.namespace == "c10d":
            self.names.append(function._schema.name.removeprefix("c10d::"))
        elif "ctc_loss" in function._schema.name:
            self.names.append("backward" if "backward" in function._schema.name else "forward")
        return function(*arguments, **(settings or {}))


def _run_rank(
    command: Callable[[], None], record_path: Path, stop_at: int | None, failure: dict | None, counts_exchanges: bool
) -> int:
    import scoring
    import train
    from errors import exit_status

    if failure:
        _inject(failure)
    record: dict[str, list] = {"gradients": [], "trained": [], "scored": [], "exchanges": []}
    train_step, evaluate, score_one = train.train_step, train.evaluate, scoring.score_one
    evaluating = []

    def recording_train_step(run: train.Run, update: train.Update) -> tuple[torch.Tensor, torch.Tensor]:
        if run.state.step == stop_at:
            raise RuntimeError("the failure that the test asks for")
        counter = Exchanges() if counts_exchanges else contextlib.nullcontext()
        with counter:
            result = train_step(run, update)
        if counts_exchanges:
            record["exchanges"].append(counter.names)
        if run.is_sharded:
            record["is_sharded"] = [all(isinstance(value, DTensor) for value in run.model.parameters())]
        else:
            record["gradients"].append(run.gradients.buffer.clone())
        record["pieces"] = sum(_local(parameter).numel() for parameter in run.model.parameters())
        record["trained"].append([name for batch in update.micro_batches for name in batch.ids])
        return result

    def recording_evaluate(*arguments: object) -> scoring.Evaluation:
        evaluating.append(True)
        try:
            return evaluate(*arguments)
        finally:
            evaluating.pop()

    def recording_score_one(run: train.Run, batch: train.Batch) -> tuple:
        score, texts = score_one(run, batch)
        if evaluating:
            hypotheses = [text.hypothesis for text in texts]
            record["scored"] += [(run.state.step, *pair) for pair in zip(batch.ids, hypotheses, strict=True)]
        return score, texts

    train.train_step, train.evaluate, scoring.score_one = recording_train_step, recording_evaluate, recording_score_one
    try:
        return exit_status(command)
    finally:
        torch.save(record, record_path)


# --- Asking it -----------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """What the processes of one run left behind, by rank."""

    statuses: list[int]
    stdout: list[str]
    stderr: list[str]
    records: list[dict[str, list]]
    run_dir: Path
    parts: list[list[str]] = field(default_factory=list)
    """Of prepare.py: what each rank has begun."""

    def log(self) -> list[dict[str, str]]:
        return read_table(self.run_dir / "training_log.csv")

    def column(self, name: str) -> list[float]:
        return [float(row[name] or "nan") for row in self.log()]

    def state(self, step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.run_dir / "checkpoints" / f"step_{step:06d}" / "tensors.safetensors")

    def trained(self, step: int) -> list[str]:
        """Ids of one update over all ranks."""
        return sorted(name for record in self.records for name in record["trained"][step])

    def scored(self) -> list[tuple[int, str, str]]:
        return sorted(row for record in self.records for row in record["scored"])


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def run_ranks(server: subprocess.Popen, tmp_path: Path) -> Callable[..., Ranks]:
    """Train with a number of processes, into the run directory of this name."""
    numbers = iter(range(100))

    def run(
        num_processes: int, name: str, *arguments: object, stop_at: int | None = None, failure: dict | None = None,
        status: int = 0, program: str = "train", counts_exchanges: bool = False,
        launcher: Mapping[str, str] | None = None,
    ) -> Ranks:  # fmt: skip
        folder = tmp_path / f"ranks_{next(numbers)}"
        folder.mkdir()
        request = {
            "program": program, "num_processes": num_processes, "folder": str(folder), "port": free_port(),
            "stop_at": stop_at, "failure": failure, "counts_exchanges": counts_exchanges,
            "launcher": launcher or {},
            "arguments": [*map(str, arguments), f"--{OUTPUT_FLAGS[program]}", str(tmp_path / name)],
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        stdout, stderr = (
            [(folder / f"rank_{rank}.{stream}").read_text() for rank in range(num_processes)]
            for stream in ("out", "err")
        )
        assert stop_at is not None or statuses[0] == status, "\n".join(stderr)
        paths = [folder / f"rank_{rank}.pt" for rank in range(num_processes)]
        records = [torch.load(path, weights_only=True) for path in paths if path.exists()]
        notes = [folder / f"rank_{rank}.parts" for rank in range(num_processes)]
        parts = [path.read_text().splitlines() if path.exists() else [] for path in notes]
        return Ranks(statuses, stdout, stderr, records, tmp_path / name, parts)

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def repeatable(ranks: Ranks) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in MEASURED_COLUMNS} for row in ranks.log()]


def assert_same_training(found: Ranks, expected: Ranks, steps: int) -> None:
    """Losses, gradient norms, gradients of the first update, weights at the end; and what was trained on."""
    assert_same_outcome(found, expected, steps)
    assert found.column("train_loss")[0] == pytest.approx(expected.column("train_loss")[0], rel=1e-5)
    mine, theirs = (ranks.records[0]["gradients"][0] for ranks in (found, expected))
    assert (mine - theirs).norm() / theirs.norm() < 1e-5
    for step in range(steps):
        assert found.trained(step) == expected.trained(step)
        assert all(torch.equal(r["gradients"][step], found.records[0]["gradients"][step]) for r in found.records)


def assert_same_outcome(found: Ranks, expected: Ranks, steps: int) -> None:
    """Losses, gradient norms and learning rates of all rows, and the weights at the end."""
    for name in ("step", "train_loss", "grad_norm", "learning_rate"):
        assert found.column(name) == pytest.approx(expected.column(name), rel=1e-4, nan_ok=True), name
    weights = expected.state(steps)
    for name, value in found.state(steps).items():
        # A bias of the keys cancels in the softmax: its gradient is rounding, which AdamW makes a step of.
        if name.startswith("model/") and not name.endswith("k_proj.bias"):
            assert (value - weights[name]).norm() <= 1e-4 * weights[name].norm() + 1e-6, name


def assert_scored_once(found: Ranks, expected: Ranks) -> None:
    """Traps 6 and 16: the ranks divide dev and test set, nothing is scored twice, and the texts are those of one."""
    rows = found.scored()
    assert len(rows) == len({(step, name) for step, name, _ in rows}) == 5 + 4
    assert max(len(record["scored"]) for record in found.records) < len(rows)
    assert rows == expected.scored()


def assert_one_voice(ranks: Ranks) -> None:
    """The first rank speaks and writes; the others are silent."""
    assert ranks.stdout[0].count("finished: ") == 1
    assert ranks.stdout[1:] == [""] * (len(ranks.stdout) - 1)
    assert ranks.stderr[1:] == [""] * (len(ranks.stderr) - 1)


# --- Promises 1 and 2 over processes -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train_adapters", "lora_rank"])
def test_promise_1_two_processes_train_the_same_parts_and_resume(
    part: str, prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Adapters and LoRA, whose checkpoints hold what is trained alone."""
    if part == "lora_rank":
        pytest.importorskip("peft")
    write_published_like_checkpoint(tmp_path / "xls-r", shrink(XLS_R_300M), "safetensors")
    names = ("hidden_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop", "mask_time_prob")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=None, model_name_or_path=str(tmp_path / "xls-r"), max_steps=5,
        save_steps=2, model_overrides=dict.fromkeys(names, 0.0), freeze_feature_encoder=True,
        **{part: True if part == "train_adapters" else 4},
    )  # fmt: skip
    flags = ("--config", recipe, "--per_device_train_batch_size")
    alone = run_ranks(1, "alone", *flags, 8)
    pair = run_ranks(2, "pair", *flags, 4)
    assert_same_training(pair, alone, steps=5)
    assert_one_voice(pair)
    run_ranks(2, "parts", *flags, 4, stop_at=3)
    resumed = run_ranks(2, "parts", *flags, 4, "--resume_from_checkpoint", "last")
    assert repeatable(resumed) == repeatable(pair)
    mine, theirs = resumed.state(5), pair.state(5)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    whole = load_file(pair.run_dir / "model" / "model.safetensors")
    assert len([name for name in mine if name.startswith("model/")]) < len(whole)


@pytest.mark.slow
def test_promise_1_two_processes_draw_from_two_sets_what_one_does(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Sampled by weight and temperature, with clips that repeat in an epoch and masks; stopped and resumed by two."""
    other = tmp_path / "other"
    write_part(other / "train" / "part_1", make_rows(3, seed=21, speakers=("dan",)))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_MODEL | MASKS | {"initializer_range": 0.1}, max_steps=5,
        save_steps=2,
    )  # fmt: skip
    sampled = ("--data_dir", prepared, other, "--data_weights", 1, 1, "--sample_by", "speaker")
    flags = ("--config", recipe, *sampled, "--sampling_temperature", "balanced", "--per_device_train_batch_size")
    one, two = run_ranks(1, "one", *flags, 8), run_ranks(2, "two", *flags, 4)
    assert [len(one.trained(step)) for step in range(5)] == [8, 8, 8, 8, 8]
    assert_same_training(two, one, steps=5)
    assert_one_voice(two)
    run_ranks(2, "parts", *flags, 4, stop_at=3)
    parts = run_ranks(2, "parts", *flags, 4, "--resume_from_checkpoint", "last")
    assert all(torch.equal(value, two.state(5)[name]) for name, value in parts.state(5).items())
    assert repeatable(parts) == repeatable(two)


@pytest.mark.parametrize(
    ("architecture", "numbers"), [(TINY_MODEL, [2]), (TINY_GROUP_NORM_MODEL, [2, 5])], ids=["layer_norm", "group_norm"]
)
def test_several_processes_do_what_one_does(
    architecture: dict[str, object],
    numbers: list[int],
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],
) -> None:
    """Updates of ten and three utterances: with five processes two cuts of the short ones are empty."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=architecture | MASKS | {"initializer_range": 0.1},
        max_steps=4, per_device_eval_batch_size=1,
    )  # fmt: skip

    def run(processes: int) -> Ranks:
        size = 10 // processes
        return run_ranks(processes, f"run_{processes}", "--config", recipe, "--per_device_train_batch_size", size)

    one = run(1)
    assert [len(one.trained(step)) for step in range(4)] == [10, 3, 10, 3]
    for processes in numbers:
        several = run(processes)
        empty = [len(record["trained"][1]) for record in several.records].count(0)
        assert empty == max(0, processes - 3)
        assert_same_training(several, one, steps=4)
        assert_one_voice(several)
        assert_scored_once(several, one)
        assert several.column("step") == [1, 2, 3, 4]
        for name in ("eval_wer", "eval_cer", "eval_raw_wer", "eval_sentence_error_rate", "blank_fraction"):
            assert several.column(name) == pytest.approx(one.column(name), rel=1e-9, nan_ok=True), name
        assert several.column("eval_loss") == pytest.approx(one.column("eval_loss"), rel=1e-4, nan_ok=True)
        results = [json.loads((ranks.run_dir / "train_results.json").read_text()) for ranks in (one, several)]
        for name in ("test_wer", "test_cer", "test_wer_seen_speakers", "test_wer_unseen_speakers", "best_eval_wer"):
            assert results[0][name] == pytest.approx(results[1][name]), name
        facts = json.loads((several.run_dir / "environment.json").read_text())["launcher"]
        assert facts["num_processes"] == processes
    assert len({hypothesis for *_, hypothesis in one.scored()}) > 4


def test_processes_exchange_once_per_update_behind_its_last_micro_batch(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Three micro-batches each: first how it went and who wants to stop, then all gradients with the loss."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2,
        do_predict=False,
    )  # fmt: skip
    found = run_ranks(2, "run", "--config", recipe, counts_exchanges=True)
    full, short = ([record["exchanges"][step] for record in found.records] for step in range(2))
    assert full == [[*["forward", "backward"] * 3, "allreduce_", "allreduce_"]] * 2
    # The last update of the epoch is a single clip: one of the ranks has nothing to pass through the model.
    assert sorted(short, key=len) == [["allreduce_"] * 2, ["forward", "backward", *["allreduce_"] * 2]]


@pytest.mark.slow
def test_promises_1_and_3_pre_training_by_two_processes_is_that_of_one(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Losses, codes in use and gradients, with a rank that has nothing in an epoch's last update; then a resume."""
    recipe = write_pretraining_recipe(
        tmp_path / "recipe.yaml", prepared, max_steps=6, eval_steps=3, save_steps=2, per_device_train_batch_size=2,
        max_grad_norm=1e9,
    )  # fmt: skip
    flags = ("--config", recipe, "--max_batch_seconds", "1.5")
    alone = run_ranks(1, "alone", *flags, "--gradient_accumulation_steps", 2, program="pretrain")
    both = run_ranks(2, "both", *flags, program="pretrain")
    for step in range(6):
        assert both.trained(step) == alone.trained(step)
        one, other = alone.records[0]["gradients"][step], both.records[0]["gradients"][step]
        assert torch.equal(other, both.records[1]["gradients"][step])
        if step == 0:  # later ones have weights that rounding has moved apart
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    assert [] in (both.records[rank]["trained"][3] for rank in (0, 1))  # 13 utterances in updates of four
    for name in ("train_loss", "code_perplexity", "contrastive_loss", "eval_loss", "eval_accuracy"):
        assert both.column(name)[:2] == pytest.approx(alone.column(name)[:2], rel=1e-5, nan_ok=True), name
        assert both.column(name) == pytest.approx(alone.column(name), rel=1e-3, nan_ok=True), name
    failure = {"rank": 1, "where": "measure", "passes": []}
    failed = run_ranks(2, "failed", *flags, failure=failure, program="pretrain")
    assert "done again, from now on in cuts" in failed.stderr[1]
    assert failed.column("train_loss")[:2] == pytest.approx(alone.column("train_loss")[:2], rel=1e-5, nan_ok=True)
    run_ranks(2, "parts", *flags, stop_at=3, program="pretrain")
    parts = run_ranks(2, "parts", *flags, "--resume_from_checkpoint", "last", program="pretrain")
    whole, resumed = both.state(6), parts.state(6)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("train_loss", "code_perplexity", "accuracy", "eval_loss"):
        assert parts.column(name) == pytest.approx(both.column(name), rel=0, abs=0, nan_ok=True), name


@pytest.mark.slow
def test_checkpointing_a_frozen_encoder_and_dropped_layers_go_together(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Recomputing draws what was drawn, so nothing changes; no rank waits for a layer that another has dropped."""
    model_config = TINY_MODEL | TALKATIVE | MASKS | {"num_hidden_layers": 3, "layerdrop": 0.5, "hidden_dropout": 0.2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=model_config, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, freeze_feature_encoder=True, max_steps=4, do_predict=False,
    )  # fmt: skip
    kept = run_ranks(2, "kept", "--config", recipe)
    recomputed = run_ranks(2, "recomputed", "--config", recipe, "--gradient_checkpointing")
    assert recomputed.statuses == [0, 0]
    assert repeatable(recomputed) == repeatable(kept)
    for ours, theirs in zip(recomputed.records, kept.records, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours["gradients"], theirs["gradients"], strict=True))
    first, last = kept.state(4), recomputed.state(4)
    frozen = [name for name in first if name.startswith("model/wav2vec2.feature_extractor")]
    assert frozen
    assert not any(name.startswith("optimizer.exp_avg.wav2vec2.feature_extractor") for name in last)
    # Without the draws, which follow the cut, the checkpointed run of two is that of one.
    still = ("--gradient_checkpointing", "--config", write_recipe(
        tmp_path / "still.yaml", prepared, model_config=TINY_MODEL | MASKS | {"initializer_range": 0.1},
        freeze_feature_encoder=True, max_steps=4, do_predict=False, per_device_train_batch_size=4, save_steps=4,
    ))  # fmt: skip
    one = run_ranks(1, "one", *still, "--per_device_train_batch_size", 8)
    assert_same_training(run_ranks(2, "two", *still), one, steps=4)


def test_resume_with_two_processes_is_invisible(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Bit for bit with as many processes; with one process the same updates."""
    model_config = TINY_MODEL | TALKATIVE | MASKS | {"hidden_dropout": 0.2, "layerdrop": 0.5, "num_hidden_layers": 2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=model_config, per_device_train_batch_size=4,
        logging_steps=2, eval_steps=3, save_steps=2, max_steps=6, do_predict=False, augment_speed=[0.9, 1.1],
        augment_noise=["babble"], consistency_weight=0.2, label_smoothing=0.1, freeze_encoder_steps=3,
    )  # fmt: skip
    whole = run_ranks(2, "whole", "--config", recipe)
    stopped = run_ranks(2, "parts", "--config", recipe, stop_at=5)
    assert stopped.statuses == [1, 1]
    assert all("the failure that the test asks for" in error for error in stopped.stderr)
    shutil.copytree(tmp_path / "parts", tmp_path / "fewer")

    # Ranks that meet a damaged checkpoint say so once, and agree on the one before.
    (tmp_path / "parts" / "checkpoints" / "step_000004" / "state.json").write_text("{}")
    resumed = run_ranks(2, "parts", "--config", recipe, "--resume_from_checkpoint", "last")
    assert_one_voice(resumed)
    assert resumed.stdout[0].count("skipping the damaged checkpoint") == 1
    assert "at step 2 of 6" in resumed.stdout[0]
    assert repeatable(resumed) == repeatable(whole)
    mine, theirs = resumed.state(6), whole.state(6)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    samples = [(ranks.run_dir / "eval_samples.csv").read_text() for ranks in (whole, resumed)]
    assert samples[0] == samples[1]

    alone = run_ranks(1, "fewer", "--config", recipe, "--resume_from_checkpoint", "last")
    assert "at step 4 of 6" in alone.stdout[0]
    assert [alone.trained(step) for step in range(2)] == [whole.trained(step) for step in range(4, 6)]
    assert alone.column("step") == whole.column("step")


# Of the final model: see best_model.py.
SELECTION = {
    "ema_decay": 0.5, "average_best": 2, "early_stopping_patience": 2, "metric_for_best_model": "eval_loss",
}  # fmt: skip


def assert_same_choice(found: Ranks, expected: Ranks) -> None:
    """Averages, the best, where the run stopped: in one more process' view rounding aside."""
    results = [json.loads((ranks.run_dir / "train_results.json").read_text()) for ranks in (found, expected)]
    for name in ("best_step", "best_weights", "average_of_steps", "kept", "stopped_early_at_step"):
        assert results[0].get(name) == results[1].get(name), name
    for name in ("best_eval_loss", "average_eval_loss"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4), name
    assert found.column("ema_eval_loss") == pytest.approx(expected.column("ema_eval_loss"), rel=1e-4, nan_ok=True)
    (mine, last), (theirs, _) = (
        (ranks.state(int(ranks.column("step")[-1])), ranks.column("step")[-1]) for ranks in (found, expected)
    )
    assert mine["ema.num_updates"] == theirs["ema.num_updates"] == last
    averages = [name for name in theirs if name.startswith("ema/")]
    assert averages
    for name in averages:
        if not name.endswith("k_proj.bias"):
            assert (mine[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-6, name


@pytest.mark.slow
def test_averages_and_patience_with_two_processes_are_those_of_one(
    tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Both processes stop at the same step, and so does a run that was stopped in between: bit for bit.

    Dev is in letters that the vocabulary lacks: WER 1.0 for a reason that no patience mends.
    """
    write_part(tmp_path / "data" / "train" / "part_1", make_rows(13, seed=1))
    dev = [(name, samples, "ÉÈ ÊË", speaker) for name, samples, _, speaker in make_rows(5, seed=2)]
    write_part(tmp_path / "data" / "dev" / "part_1", dev)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "data", model_config=TINY_MODEL | MASKS | {"initializer_range": 0.1},
        per_device_train_batch_size=4, eval_steps=1, save_steps=2, max_steps=8, learning_rate=1e-5, preflight="warn",
        **SELECTION | {"early_stopping_threshold": 0.5},
    )  # fmt: skip
    one = run_ranks(1, "one", "--config", recipe, "--per_device_train_batch_size", 8)
    whole = run_ranks(2, "two", "--config", recipe)
    assert whole.statuses == [0, 0]
    assert_one_voice(whole)
    assert_same_choice(whole, one)
    last = int(whole.column("step")[-1])
    assert last == 3, "of 8"
    stopped = run_ranks(2, "parts", "--config", recipe, stop_at=last - 1)
    assert stopped.statuses == [1, 1]
    resumed = run_ranks(2, "parts", "--config", recipe, "--resume_from_checkpoint", "last")
    assert repeatable(resumed) == repeatable(whole)
    mine, theirs = resumed.state(last), whole.state(last)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert_same_choice(resumed, whole)


@pytest.mark.slow
def test_resume_with_another_number_of_processes_makes_the_same_updates(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Stopped in the middle of the second of three epochs, behind an update that is lost with it."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_GROUP_NORM_MODEL | MASKS | {"initializer_range": 0.1},
        max_steps=6, save_steps=3, do_predict=False,
    )  # fmt: skip
    whole = run_ranks(1, "whole", "--config", recipe, "--per_device_train_batch_size", 10)
    updates = [whole.trained(step) for step in range(6)]
    assert [len(ids) for ids in updates] == [10, 3] * 3
    for before, numbers in ((2, [1, 5]), (1, [2])):
        flags = ("--config", recipe, "--per_device_train_batch_size", 10 // before)
        stopped = run_ranks(before, f"from_{before}", *flags, stop_at=4)
        assert [path.name for path in list_checkpoints(stopped.run_dir)] == ["step_000003"]
        for after in numbers:
            name = f"from_{before}_to_{after}"
            shutil.copytree(stopped.run_dir, tmp_path / name)
            resumed = run_ranks(after, name, *flags, "--resume_from_checkpoint", "last")
            assert "at step 3 of 6" in resumed.stdout[0]
            trained = [stopped.trained(step) for step in range(3)] + [resumed.trained(step) for step in range(3)]
            assert trained == updates, name
            for epoch in range(3):
                ids = trained[2 * epoch] + trained[2 * epoch + 1]
                assert len(ids) == len(set(ids)) == 13, (name, epoch)
            assert_same_outcome(resumed, whole, steps=6)
            for column in ("eval_wer", "eval_cer", "blank_fraction"):
                assert resumed.column(column)[-1] == whole.column(column)[-1], (name, column)
            assert [len(record["trained"][0]) for record in resumed.records].count(0) == max(0, after - 3), name


def test_every_rank_refuses_and_the_first_says_why(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, vocabulary="large_960h", case="lower")
    refused = run_ranks(2, "run", "--config", recipe, stop_at=-1)
    assert refused.statuses == [2, 2]
    assert refused.stderr[0].startswith("error: preflight refuses: coverage train: ")
    assert refused.stderr[0].count("\n") == 1
    assert "with --case upper coverage is 100.00%" in refused.stderr[0]
    assert refused.stderr[1] == refused.stdout[1] == ""
    assert not (tmp_path / "run").exists()


# --- Out of memory on one rank -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_runs_out_on_one_rank_changes_nothing(
    where: str, prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Promise 1: the rank does its share of the update again in smaller cuts, and the other waits for it.

    The second failure comes when the first piece has added its gradients already (trap 29).
    """
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_GROUP_NORM_MODEL | MASKS | {"initializer_range": 0.1},
        per_device_train_batch_size=4, max_steps=4, do_predict=False, save_steps=4,
    )  # fmt: skip
    whole = run_ranks(2, "whole", "--config", recipe)
    failure = {"rank": 1, "step": 2, "where": where, "passes": [0, 2]}
    found = run_ranks(2, "found", "--config", recipe, failure=failure)
    assert found.statuses == [0, 0]
    assert_same_training(found, whole, steps=4)
    assert found.column("oom_retries") == [0, 0, 2, 2]
    said = [line for line in found.stderr[1].splitlines() if "out of memory in an update" in line]
    assert len(said) == 2
    assert said[0].startswith("[rank 1] out of memory in an update, with 4 clips of up to ")
    assert all(name in said[0] for name in whole.records[1]["trained"][2])
    assert found.stderr[0] == ""
    pair = [(ranks.column("eval_wer"), ranks.column("eval_cer")) for ranks in (found, whole)]
    assert repr(pair[0]) == repr(pair[1])


def test_memory_that_never_suffices_on_one_rank_stops_all_ranks(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, save_steps=2)
    failure = {"rank": 1, "step": 3, "where": "forward", "passes": list(range(100))}
    stopped = run_ranks(2, "run", "--config", recipe, failure=failure, status=1)
    assert stopped.statuses == [1, 1]
    assert "[rank 1] failed: out of memory in an update with a single clip of " in stopped.stderr[1]
    assert stopped.stderr[0] == "failed: another process of the run is out of memory; its own message says where\n"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_in_an_evaluation(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """The English seed's second wall: cut where that helps, else all ranks stop with the reason."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, per_device_eval_batch_size=2, eval_steps=2,
        max_steps=4, model_config=TINY_MODEL | TALKATIVE, do_predict=False,
    )  # fmt: skip
    whole = run_ranks(2, "whole", "--config", recipe)
    failure = {"rank": 1, "step": 2, "where": "forward", "passes": [0], "evaluating": True}
    found = run_ranks(2, "found", "--config", recipe, failure=failure)
    assert found.statuses == [0, 0]
    assert found.scored() == whole.scored()
    assert found.column("oom_retries")[-1] == 1
    assert found.stderr[1].startswith("[rank 1] out of memory in an evaluation, with 2 clips of up to ")
    failure["passes"] = list(range(100))
    stopped = run_ranks(2, "stopped", "--config", recipe, failure=failure, status=1)
    assert stopped.statuses == [1, 1]
    error = stopped.stderr[1].splitlines()[-1]
    assert error.startswith("[rank 1] failed: out of memory in an evaluation with a single clip of ")
    assert "cut the clip" in error
    assert "gradient_checkpointing" not in error
    assert stopped.stderr[0] == "failed: another process of the run is out of memory; its own message says where\n"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_nan_on_one_rank_spoils_no_other_row_of_the_log(
    rank: int, prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, max_steps=4, do_predict=False, eval_steps=4,
        logging_steps=2, learning_rate=1e-7,
    )  # fmt: skip
    whole = run_ranks(2, "whole", "--config", recipe)
    failure = {"rank": rank, "step": 1, "where": "nan", "passes": [0]}
    found = run_ranks(2, "found", "--config", recipe, failure=failure)
    assert found.column("bad_updates") == [1, 1]
    # The first row is that of its one good update, whose loss the weights of this rate do not move.
    every = run_ranks(2, "every", "--config", recipe, "--logging_steps", 1)
    assert found.column("train_loss") == pytest.approx(
        [every.column("train_loss")[0], whole.column("train_loss")[1]], rel=1e-4
    )


@pytest.mark.slow
def test_the_heaviest_batches_are_run_on_every_rank_and_the_worst_counts(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """A limit that only the rank with less room breaks is broken for all; the budget that is found is the same."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, max_steps=2)
    failure = {"rank": 1, "where": "probe", "step": 0, "passes": [], "rows": 3}
    refused = run_ranks(2, "run", "--config", recipe, failure=failure, status=2)
    assert refused.statuses == [2, 2]
    assert "memory training: does not fit: heaviest batch 4 x " in refused.stderr[0]
    found = run_ranks(2, "auto", "--config", recipe, "--max_batch_seconds", "auto", failure=failure)
    assert found.statuses == [0, 0]
    report = json.loads((tmp_path / "auto" / "preflight.json").read_text())
    by_check = {finding["check"]: finding for finding in report["findings"]}
    assert by_check["memory training"]["facts"]["shape"][0] < 3
    longest_dev = 5
    assert by_check["memory evaluation"]["facts"]["shape"][0] <= longest_dev
    assert [len(found.trained(step)) for step in range(2)] == [8, 5]


def test_a_rank_that_ends_stops_the_others_at_once(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, save_steps=2)
    failure = {"rank": 1, "step": 3, "where": "end", "passes": [0]}
    stopped = run_ranks(2, "run", "--config", recipe, failure=failure, status=1)
    assert stopped.statuses == [1, 9]
    (line,) = stopped.stderr[0].splitlines()
    assert line.startswith("failed: another process of the run has ended (")


def test_a_model_that_does_not_open_stops_all_ranks(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Only the first rank saves and checks; the other waits for it, and not in an exchange of gradients."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, eval_steps=2)
    failure = {"rank": 0, "where": "save", "step": -1, "passes": []}
    stopped = run_ranks(2, "run", "--config", recipe, failure=failure, status=1)
    assert stopped.statuses == [1, 1]
    assert "logits: different by 3 (at most 0.0001)" in stopped.stderr[0]
    said = "[rank 1] failed: the first process of the run has failed; its own message says why\n"
    assert stopped.stderr[1] == said
    assert [len(record["trained"]) for record in stopped.records] == [2, 2]


@pytest.mark.slow
def test_a_rank_that_hangs_stops_the_others_in_bounded_time(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, save_steps=2)
    failure = {"rank": 1, "step": 3, "where": "hang", "passes": [0]}
    started_at = time.monotonic()
    stopped = run_ranks(2, "run", "--config", recipe, "--ddp_timeout", 3, failure=failure, status=1)
    assert stopped.statuses == [1, 9]
    (line,) = stopped.stderr[0].splitlines()
    assert line.startswith("failed: another process of the run has not answered within --ddp_timeout (")
    assert (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()
    assert time.monotonic() - started_at < SECONDS_FOR_A_RUN


# --- evaluate.py ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_promise_2_evaluation_by_two_processes_is_that_of_one(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """Each utterance once, the same table byte for byte; also where one rank has no text at all."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_GROUP_NORM_MODEL | TALKATIVE, max_steps=2,
        do_predict=False,
    )  # fmt: skip
    model = run_ranks(1, "run", "--config", recipe).run_dir / "model"
    for split, flags in (("train", ("--per_device_eval_batch_size", 2)), ("test", ())):
        settings = ("--model_name_or_path", model, "--data_dir", prepared, "--split", split, *flags)
        one, two = (run_ranks(count, f"{split}_{count}", *settings, program="evaluate") for count in (1, 2))
        tables = [(ranks.run_dir / "utterances.csv").read_bytes() for ranks in (one, two)]
        assert tables[0] == tables[1]
        results = [json.loads((ranks.run_dir / "results.json").read_text()) for ranks in (one, two)]
        for found in results:
            del found["processes"], found["seconds_taken"]
        assert results[0] == results[1]
        assert two.stdout[1] == ""


@pytest.mark.slow
def test_promise_2_a_ranking_by_two_processes_is_that_of_one(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks]
) -> None:
    """The same files byte for byte, by one model and by two halves."""
    halves = []
    for name, settings in (("a", {}), ("b", {"train_rest": True})):
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", prepared, model_config=TINY_GROUP_NORM_MODEL | TALKATIVE, max_steps=2,
            do_predict=False, train_fraction=0.5, **settings,
        )  # fmt: skip
        halves.append(run_ranks(1, name, "--config", recipe).run_dir / "model")
    for name, flags in (("one", ()), ("both", ("--other_half", halves[1]))):
        settings = ("--model_name_or_path", halves[0], "--data_dir", prepared, "--rank_train", *flags)
        settings += ("--per_device_eval_batch_size", 2)
        folders = [run_ranks(count, f"{name}_{count}", *settings, program="evaluate").run_dir for count in (1, 2)]
        for file in ("train_ranking.csv", "train_ranking.json"):
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.slow
def test_promise_2_beam_search_by_two_processes_is_that_of_one(
    prepared: Path, tmp_path: Path, run_ranks: Callable[..., Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="the extra lm is not installed (flashlight-text)")
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_GROUP_NORM_MODEL | TALKATIVE, max_steps=2,
        do_predict=False,
    )  # fmt: skip
    model = run_ranks(1, "run", "--config", recipe).run_dir / "model"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row[2] for row in make_rows(60, 9)))
    build = [
        "build-lm",
        "--text",
        text,
        "--data_dir",
        prepared,
        "--out",
        tmp_path / "lm",
        "--model_name_or_path",
        model,
    ]
    monkeypatch.setattr(sys, "argv", ["decoding.py", *map(str, build)])
    decoding.main()
    settings = ("--model_name_or_path", model, "--data_dir", prepared, "--split", "train", "--lm", tmp_path / "lm")
    one, two = (run_ranks(count, f"lm_{count}", *settings, program="evaluate") for count in (1, 2))
    for name in ("utterances.csv", "lm/utterances.csv"):
        assert (one.run_dir / name).read_bytes() == (two.run_dir / name).read_bytes()
    found = [json.loads((ranks.run_dir / "lm" / "comparison.json").read_text()) for ranks in (one, two)]
    assert found[0]["error_classes"]["words"] > 20
    assert found[0] | {"other_model": ""} == found[1] | {"other_model": ""}
    results = [json.loads((ranks.run_dir / "lm" / "results.json").read_text()) for ranks in (one, two)]
    for own in results:
        del own["processes"], own["seconds_taken"], own["audio_seconds_per_second"], own["beam_processes"]
    assert results[0] == results[1]


# --- prepare.py ----------------------------------------------------------------------------------------------------


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_divide_the_parts_of_a_corpus(tmp_path: Path, run_ranks: Callable[..., Ranks]) -> None:
    """Each part is made once, and the folder is that of one process byte for byte, ids that occur twice included."""
    again = ("train3.wav,again,s1,train,x", "gone.wav,gone,s1,train,x")
    corpus = write_corpus(tmp_path / "corpus", {"train": 11, "dev": 3, "test": 2}, again)
    flags = ("--corpus", corpus, "--chunk_size", 3, "--num_workers", 1)
    one, two = (run_ranks(count, f"by_{count}", *flags, program="prepare") for count in (1, 2))
    assert two.statuses == [0, 0]
    assert two.parts == [
        ["train/part_1", "train/part_3", "train/part_5", "test/part_1"],
        ["train/part_2", "train/part_4", "dev/part_1"],
    ]
    assert file_contents(one.run_dir) == file_contents(two.run_dir)
    assert {row["reason"] for row in read_table(two.run_dir / "dropped.csv")} == {"duplicate_id", "missing"}
    assert two.stdout[1] == two.stderr[1] == ""
    assert two.stdout[0].count("rows left out") == 1

    # A process that ends stops the others; what is finished stays, and one process does the rest.
    failure = {"rank": 1, "part": 2}
    stopped = run_ranks(2, "stopped", *flags, program="prepare", failure=failure, status=1)
    assert stopped.statuses == [1, 9]
    assert stopped.stderr[0].startswith("failed: another process of the run has ended (")
    assert not (stopped.run_dir / "prepare.json").exists()
    rest = run_ranks(1, "stopped", *flags, program="prepare")
    assert rest.parts == [["train/part_4", "dev/part_1"]]
    assert file_contents(rest.run_dir) == file_contents(one.run_dir)

    # Another command may not work in the same folder, and all processes say no.
    refused = run_ranks(2, "stopped", *flags[:-3], 4, program="prepare", status=2)
    assert refused.statuses == [2, 2]
    assert "was prepared with other settings: chunk_size 3 (now 4)" in refused.stderr[0]
    assert refused.stderr[1] == ""


# --- Asked to stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_processes", "failure", "status", "stopped_at"),
    [
        (1, {"where": "SIGTERM", "step": 3}, 143, 4),
        pytest.param(1, {"where": "SIGUSR1", "step": 2}, 143, 3, marks=pytest.mark.slow),
        pytest.param(1, {"where": "SIGINT", "step": 3, "evaluating": True}, 130, 3, marks=pytest.mark.slow),
        pytest.param(2, {"where": "SIGTERM", "step": 2, "rank": 1}, 143, 3, marks=pytest.mark.slow),
        pytest.param(2, {"where": "SIGINT", "step": 6, "rank": 0, "evaluating": True}, 130, 6, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not_been(
    num_processes: int, failure: dict, status: int, stopped_at: int, prepared: Path, tmp_path: Path,
    run_ranks: Callable[..., Ranks],
) -> None:  # fmt: skip
    """In an update (also one whose row of the log is due), and in an evaluation; on one rank of two."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_MODEL | TALKATIVE | MASKS | {"hidden_dropout": 0.2},
        per_device_train_batch_size=8 // num_processes, per_device_eval_batch_size=1, logging_steps=2, eval_steps=3,
        save_steps=5, max_steps=7, do_predict=False,
    )  # fmt: skip
    whole = run_ranks(num_processes, "whole", "--config", recipe)
    failure = {"rank": 0, "passes": [0]} | failure
    flags = ("--config", recipe, "--resume_from_checkpoint", "auto")
    stopped = run_ranks(num_processes, "parts", *flags, failure=failure, status=status)
    assert stopped.statuses == [status] * num_processes
    assert "Traceback" not in "".join(stopped.stderr)
    assert f"stopped: {failure['where']}" in stopped.stderr[0]
    names = [path.name for path in sorted((tmp_path / "parts" / "checkpoints").iterdir())]
    assert names[-1] == f"step_{stopped_at:06d}"

    resumed = run_ranks(num_processes, "parts", *flags)
    assert f"at step {stopped_at} of 7" in resumed.stdout[0]
    assert repeatable(resumed) == repeatable(whole)
    mine, theirs = resumed.state(7), whole.state(7)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    samples = [(ranks.run_dir / "eval_samples.csv").read_text() for ranks in (whole, resumed)]
    assert samples[0] == samples[1]
    steps = [stopped.trained(step) for step in range(stopped_at)]
    steps += [resumed.trained(step) for step in range(7 - stopped_at)]
    assert steps == [whole.trained(step) for step in range(7)]
    assert "finished already" in run_ranks(num_processes, "parts", *flags).stdout[0]


# --- The launcher itself -------------------------------------------------------------------------------------------


def launch(tmp_path: Path, *arguments: object) -> subprocess.Popen:
    """`accelerate launch` with its output in one stream."""
    command = [Path(sys.executable).parent / "accelerate", "launch", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen, children: list[psutil.Process]) -> None:
    """Leave nothing behind, whatever happened."""
    for child in children:
        if child.is_running():
            child.kill()
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.slow
def test_launcher_starts_two_processes_without_a_gpu(prepared: Path, tmp_path: Path) -> None:
    """Traps 8, 9 and 27: the multi-GPU command, two gloo ranks, status 0, one writer."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, dataloader_num_workers=1)
    process = launch(
        tmp_path, "--multi_gpu", "--num_processes", 2, "--main_process_port", free_port(), "--mixed_precision", "no",
        REPOSITORY / "train.py", "--config", recipe, "--output_dir", "run",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS_FOR_A_RUN)
    finally:
        end(process, [])
    assert process.returncode == 0, output
    assert "x 2 processes = 8 utterances" in output
    assert output.count("finished: 5 updates") == 1
    assert [row["step"] for row in read_table(tmp_path / "run" / "training_log.csv")] == ["1", "2", "3", "4", "5"]
    assert "num_processes 2" in (tmp_path / "run" / "config.yaml").read_text().splitlines()[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.slow
@pytest.mark.parametrize("to_group", [False, True], ids=["launcher", "group"])
def test_training_ends_with_its_launcher(to_group: bool, prepared: Path, tmp_path: Path) -> None:
    """Trap 26: SIGTERM to the launcher alone, or to its loaders too, leaves a checkpoint and no process behind."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, max_steps=1_000_000, save_steps=1_000_000, dataloader_num_workers=1
    )
    process = launch(
        tmp_path, "--num_processes", 1, "--mixed_precision", "no", REPOSITORY / "train.py",
        "--config", recipe, "--output_dir", "run",
    )  # fmt: skip
    children: list[psutil.Process] = []
    deadline = threading.Timer(SECONDS_FOR_A_RUN, process.kill)
    deadline.start()
    try:
        assert any(line.startswith("step 2/") for line in process.stdout), "training never began"
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("train.py" in " ".join(child.cmdline()) for child in children)
        if to_group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        assert "stopped: SIGTERM" in process.stdout.read()
    finally:
        deadline.cancel()
        end(process, children)
    assert process.returncode != 0
    (saved,) = list_checkpoints(tmp_path / "run")
    assert find_damage(saved) is None


if __name__ == "__main__":
    serve()
