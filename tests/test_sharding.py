"""FSDP over two gloo processes: the updates, the evaluations and the files of the run that is not divided."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import REPOSITORY, TINY_MODEL, write_recipe
from test_ddp import (  # noqa: F401 - fixtures
    MASKS,
    SECONDS_FOR_A_RUN,
    SELECTION,
    Ranks,
    assert_same_choice,
    assert_same_outcome,
    free_port,
    launch,
    repeatable,
    run_ranks,
    server,
)
from transformers import Wav2Vec2ForCTC

from sharding import REQUIRED

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}  # fmt: skip


@pytest.mark.slow
def test_a_divided_model_makes_the_updates_of_a_whole_one(
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    """Also where one process has nothing to do, stopped and resumed, with checkpointing and a frozen encoder."""
    model_config = TINY_MODEL | MASKS | {"initializer_range": 0.1, "num_hidden_layers": 3}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=model_config, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, freeze_feature_encoder=True, gradient_checkpointing=True, max_steps=6,
        eval_steps=3, save_steps=2,
    )  # fmt: skip
    whole = run_ranks(2, "whole", "--config", recipe)
    assert [len(whole.trained(step)) for step in range(2)] == [12, 1]
    divided = run_ranks(2, "divided", "--config", recipe, launcher=FSDP)
    assert divided.statuses == [0, 0]
    assert "FSDP" in (divided.run_dir / "config.yaml").read_text().splitlines()[0]
    assert_same_outcome(divided, whole, steps=6)
    for name in ("eval_wer", "eval_cer"):
        assert divided.column(name) == pytest.approx(whole.column(name), nan_ok=True), name
    assert divided.scored() == whole.scored()
    assert divided.records[0]["is_sharded"] == [True]
    assert divided.records[0]["pieces"] < 0.7 * whole.records[0]["pieces"]

    stopped = run_ranks(2, "parts", "--config", recipe, launcher=FSDP, stop_at=5)
    assert stopped.statuses == [1, 1]
    resumed = run_ranks(2, "parts", "--config", recipe, "--resume_from_checkpoint", "last", launcher=FSDP)
    assert "at step 4 of 6" in resumed.stdout[0]
    assert repeatable(resumed) == repeatable(divided)
    mine, theirs = resumed.state(6), divided.state(6)
    assert mine.keys() == theirs.keys() == whole.state(6).keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    # One process goes on from it undivided, and transformers opens the best model.
    opened = Wav2Vec2ForCTC.from_pretrained(divided.run_dir / "model").state_dict()
    expected = Wav2Vec2ForCTC.from_pretrained(whole.run_dir / "model").state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.allclose(opened[name], expected[name], atol=1e-4) for name in opened)
    run_ranks(2, "longer", "--config", recipe, launcher=FSDP, stop_at=5)
    alone = run_ranks(1, "longer", "--config", recipe, "--resume_from_checkpoint", "last")
    assert_same_outcome(alone, whole, steps=6)


@pytest.mark.slow
def test_a_divided_model_has_the_averages_of_a_whole_one(
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    """Each process averages its pieces; evaluated, saved, stopped and resumed."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=TINY_MODEL | MASKS | {"initializer_range": 0.1},
        per_device_train_batch_size=4, max_steps=6, eval_steps=2, save_steps=2, do_predict=False,
        **SELECTION | {"early_stopping_patience": 9},
    )  # fmt: skip
    whole = run_ranks(2, "whole", "--config", recipe)
    divided = run_ranks(2, "divided", "--config", recipe, launcher=FSDP)
    assert divided.records[0]["is_sharded"] == [True]
    assert_same_outcome(divided, whole, steps=6)
    assert_same_choice(divided, whole)
    run_ranks(2, "parts", "--config", recipe, launcher=FSDP, stop_at=5)
    resumed = run_ranks(2, "parts", "--config", recipe, "--resume_from_checkpoint", "last", launcher=FSDP)
    mine, theirs = resumed.state(6), divided.state(6)
    assert mine.keys() == theirs.keys() == whole.state(6).keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP_VERSION 1, which this program does not do: set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS true, which this program does not do"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing behind train.py"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: FULL_STATE_DICT"),
        ({}, "FSDP with layerdrop 0.5: processes that drop different layers cannot share them"),
        ({"--max_batch_seconds": "auto"}, "--max_batch_seconds auto with FSDP: processes that run out of memory at"),
    ],
)
def test_what_a_divided_run_cannot_do_is_refused(
    settings: dict[str, str],
    message: str,
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    flags = [part for name, value in settings.items() if name.startswith("--") for part in (name, value)]
    launcher = FSDP | {name: value for name, value in settings.items() if not name.startswith("--")}
    model_config = TINY_MODEL | {"layerdrop": 0.0 if flags else 0.5}
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, model_config=model_config)
    refused = run_ranks(2, "run", "--config", recipe, *flags, launcher=launcher, status=2, stop_at=-1)
    assert refused.statuses == [2, 2]
    assert message in refused.stderr[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_nan_on_one_process_leaves_the_divided_update_out(
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, max_steps=4, save_steps=4)
    failure = {"rank": 1, "step": 2, "where": "nan", "passes": [0]}
    found = run_ranks(2, "found", "--config", recipe, failure=failure, launcher=FSDP)
    assert found.statuses == [0, 0]
    assert found.column("bad_updates") == [0, 0, 1, 1]
    assert all(torch.isfinite(value).all() for value in found.state(4).values())


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process_of_a_divided_run_stops_all(
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    """Its next try would be another number of passes than the others make."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4, save_steps=2)
    failure = {"rank": 1, "step": 3, "where": "forward", "passes": [0]}
    stopped = run_ranks(2, "run", "--config", recipe, failure=failure, status=1, launcher=FSDP)
    assert stopped.statuses == [1, 1]
    assert "[rank 1] failed: out of memory (CUDA out of memory." in stopped.stderr[1]
    assert "failed: another process of the run has ended (" in stopped.stderr[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.slow
def test_memory_that_runs_out_in_the_check_of_a_divided_run_stops_all(
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    """Where it is most likely to; the other process waits in the midst of the pass."""
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, per_device_train_batch_size=4)
    failure = {"rank": 1, "step": 0, "where": "forward", "passes": [0]}  # of the heaviest batch
    stopped = run_ranks(2, "run", "--config", recipe, failure=failure, status=1, launcher=FSDP)
    assert stopped.statuses == [1, 1]
    assert "[rank 1] failed: out of memory (" in stopped.stderr[1]
    assert "or launch more processes" in stopped.stderr[1]
    assert "Traceback" not in stopped.stderr[0] + stopped.stderr[1]
    assert not (tmp_path / "run").exists()


# What the launcher's file makes of a model: types and device, said by every process.
DESCRIBE = """
import sys
sys.path.insert(0, {repository!r})
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from assembly import Assembly
from config import TrainConfig, parse_arguments
from processes import start_processes

accelerator = start_processes([], "run", may_shard=True)
assembly = Assembly(parse_arguments(TrainConfig, ["--config", {recipe!r}, "--output_dir", "run"], ""), accelerator)
layers = assembly.model.hf.base_model.encoder.layers
kinds = [isinstance(module, FSDPModule) for module in (assembly.model, *layers)]
kinds += [isinstance(parameter, DTensor) for parameter in assembly.model.parameters()]
found = ("divided:", all(kinds), accelerator.num_processes, accelerator.device.type, accelerator.mixed_precision)
print(" ".join(map(str, found)))  # as one piece, between those of the other
accelerator.end_training()
"""


def launch_with_the_file(tmp_path: Path, prepared: Path) -> list[str]:
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared)
    script = tmp_path / "describe.py"
    script.write_text(DESCRIBE.format(repository=str(REPOSITORY), recipe=str(recipe)))
    process = launch(
        tmp_path, "--config_file", REPOSITORY / "configs" / "launch" / "fsdp.yaml", "--num_processes", 2,
        "--main_process_port", free_port(), script,
    )  # fmt: skip
    output, _ = process.communicate(timeout=SECONDS_FOR_A_RUN)
    assert process.returncode == 0, output
    return [line for line in output.splitlines() if line.startswith("divided:")]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes without a GPU each")
def test_the_launchers_file_divides_the_model_on_cpus(tmp_path: Path, prepared: Path) -> None:
    """Trap 35: Accelerate by itself would train undivided, in silence."""
    assert launch_with_the_file(tmp_path, prepared) == ["divided: True 2 cpu bf16"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_the_launchers_file_divides_the_model_on_gpus(tmp_path: Path, prepared: Path) -> None:
    assert launch_with_the_file(tmp_path, prepared) == ["divided: True 2 cuda bf16"] * 2


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_key_of_the_launchers_files(path: Path) -> None:
    found = load_config_from_file(str(path))
    assert found.num_processes == 8
    if found.fsdp_config:
        for name, (wanted, _) in REQUIRED.items():
            assert str(found.fsdp_config[name.lower()]).lower() == wanted.lower(), name
