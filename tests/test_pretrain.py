"""pretrain.py end to end: the loop's promises without text, its log, its ends, and what train.py makes of model/."""

import functools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    TINY_GROUP_NORM_MODEL,
    TINY_MODEL,
    forget_processes,
    make_rows,
    run_command,
    training,
    write_part,
    write_recipe,
)
from safetensors.torch import load_file
from test_train import repeatable, stopped_at, tree
from transformers import Wav2Vec2ForPreTraining

import pretrain
import train
from config import PretrainConfig
from data import training_loader
from errors import UsageError
from pretraining import PretrainingModel, collapse_reason, is_sound
from pretraining_data import PretrainingBatch
from pretraining_run import PretrainingRun
from readback import find_folders
from recovery import MemoryLimitExceeded
from runlog import PRETRAINING_COLUMNS, read_log

CODES = {
    "num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16, "num_negatives": 5,
    "feat_quantizer_dropout": 0.0, "mask_time_prob": 0.05,
}  # fmt: skip
MODEL = TINY_MODEL | CODES
# Clips of 15 to 60 frames.
MASKS = {"mask_time_prob": 0.4, "mask_time_length": 3}
NO_CLIPPING = 1e9
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def command() -> Callable[..., int]:
    """pretrain.py with these arguments, in this process: its exit status."""
    return functools.partial(run_command, pretrain.main, "pretrain.py")


def write_pretraining_recipe(path: Path, data_dir: Path, **settings: object) -> Path:
    """A recipe for --config: the tiny model, six updates of four utterances, a row of the log for each."""
    recipe = {
        "data_dir": str(data_dir), "model_config": MODEL, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "max_steps": 6, "logging_steps": 1, "eval_steps": 3, "save_steps": 2, "dataloader_num_workers": 0,
    } | MASKS  # fmt: skip
    path.write_text(yaml.safe_dump(recipe | settings))
    return path


@pytest.fixture
def recipe(prepared: Path, tmp_path: Path) -> Path:
    """The recipe over the small prepared set, whose texts do not matter here."""
    return write_pretraining_recipe(tmp_path / "recipe.yaml", prepared)


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path) -> Callable[..., PretrainingRun]:
    """A run that has not begun, to call its steps one by one."""
    folders = iter(range(100))

    def make(**settings: object) -> PretrainingRun:
        config = PretrainConfig(
            **{
                "data_dir": str(prepared), "output_dir": str(tmp_path / f"run_{next(folders)}"),
                "model_config": MODEL, "max_grad_norm": NO_CLIPPING, "dataloader_num_workers": 0,
            } | MASKS | settings
        )  # fmt: skip
        return PretrainingRun(config, train.start_processes(config.report_to, config.output_dir))

    return make


def first_update(run: PretrainingRun) -> tuple[float, dict[str, torch.Tensor], np.ndarray]:
    """Loss, gradients and what the meter counted of one update."""
    loader = training_loader(run.train_set, run.plan, run.num_labels, run.collate, run.cut, 0, 1, 0)
    (update,) = loader
    loss_sum, grad_norm = train.train_step(run, update)
    run.count(update, loss_sum, grad_norm)
    gradients = {name: value.grad.clone() for name, value in run.model.named_parameters() if value.grad is not None}
    sums = run.meter.reduce()
    counted = np.array([sums[name] for name in ("loss", "labels", *run.more_sums)])
    return float(loss_sum) / update.num_labels, gradients, counted


def test_promise_1_an_update_is_the_same_however_it_is_cut(make_run: Callable[..., PretrainingRun]) -> None:
    """In one micro-batch, in several by count and by seconds, through the loop itself: one loss and one gradient."""
    whole = first_update(make_run(per_device_train_batch_size=12))
    for cut in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},
        {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 12, "max_batch_seconds": 2.0},
    ):
        loss, gradients, counted = first_update(make_run(**cut))
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert gradients.keys() == whole[1].keys()
        scale = max(float(one.abs().max()) for one in whole[1].values())
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, whole[1][name], rtol=1e-5, atol=1e-5 * scale), (cut, name)
        np.testing.assert_allclose(counted, whole[2], rtol=1e-5)


def test_an_update_that_runs_out_of_memory_is_done_again_in_smaller_cuts(
    make_run: Callable[..., PretrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradient and counts are those of the update in one piece: nothing of the failed try is left."""
    whole = first_update(make_run(per_device_train_batch_size=8))
    run = make_run(per_device_train_batch_size=8)
    original, failed = PretrainingRun.training_losses, []

    def failing(self: PretrainingRun, batch: object) -> object:
        result = original(self, batch)
        if len(batch.ids) > 2:
            failed.append(len(batch.ids))
            raise MemoryLimitExceeded("asked for")
        return result

    monkeypatch.setattr(PretrainingRun, "training_losses", failing)
    loss, gradients, counted = first_update(run)
    assert failed[0] == 8
    assert loss == pytest.approx(whole[0], rel=1e-5)
    np.testing.assert_allclose(counted, whole[2], rtol=1e-5)
    scale = max(float(one.abs().max()) for one in whole[1].values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, whole[1][name], rtol=1e-5, atol=1e-5 * scale), name


@pytest.mark.parametrize("family", ["layer", pytest.param("group", marks=pytest.mark.slow)])
def test_promise_3_resume_is_invisible(
    family: str, prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    """Stopped before an update, in the midst of an accumulation's run, and resumed: weights and log, bit for bit."""
    base = (TINY_MODEL if family == "layer" else TINY_GROUP_NORM_MODEL) | CODES
    model_config = base | {"hidden_dropout": 0.2, "layerdrop": 0.5, "num_hidden_layers": 2}
    recipe = write_pretraining_recipe(
        tmp_path / "recipe.yaml", prepared, model_config=model_config, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, max_steps=7, warmup_steps=2, gumbel_temperature_decay=0.9,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("--config", recipe, "--output_dir", whole) == 0
    flags = ["--config", recipe, "--output_dir", parts]
    for step in (1, 5):
        with stopped_at("train_step", step):
            command(*flags)
        flags = ["--config", recipe, "--output_dir", parts, "--resume_from_checkpoint", "auto"]
    assert command(*flags) == 0
    assert "at step 4 of 7" in capsys.readouterr().out
    assert repeatable(parts) == repeatable(whole)
    last = "checkpoints/step_000007/tensors.safetensors"
    for name in (last, "model/model.safetensors"):
        (one, other) = (load_file(folder / name) for folder in (parts, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    before = tree(parts)
    assert command(*flags) == 0
    assert "finished already" in capsys.readouterr().out
    assert tree(parts) == before


def test_the_log_says_what_the_loss_is_made_of(recipe: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    run_dir = tmp_path / "run"
    assert command("--config", recipe, "--output_dir", run_dir) == 0
    log = read_log(run_dir / "training_log.csv")
    assert tuple(log.columns) == tuple(PRETRAINING_COLUMNS)
    assert log["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    trained = log[log["step"] > 0]
    weight = json.loads((run_dir / "model" / "config.json").read_text())["diversity_loss_weight"]
    np.testing.assert_allclose(
        trained["train_loss"], trained["contrastive_loss"] + weight * trained["diversity_loss"], rtol=1e-4
    )
    assert trained["code_perplexity"].between(2, 16).all()
    assert trained["accuracy"].between(0, 1).all()
    assert log["eval_loss"].notna().tolist() == [True, False, False, True, False, False, True]
    assert (run_dir / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="is a run of pretrain"):
        find_folders(run_dir)
    results = json.loads((run_dir / "train_results.json").read_text())
    assert results["best_eval_loss"] == pytest.approx(log["eval_loss"].iloc[1:].min(), rel=1e-6)
    assert results["best_step"] in (3, 6)


def test_the_evaluation_does_not_depend_on_its_batches(make_run: Callable[..., PretrainingRun]) -> None:
    """And is the same twice: masks, distractors and choice of codes are functions of the clip."""
    run = make_run(per_device_eval_batch_size=1)
    figures = run._score()
    other = make_run(per_device_eval_batch_size=5, seed=7)
    other.model.load_state_dict(run.model.state_dict())
    assert run._score() == figures
    assert other._score() == pytest.approx(figures, rel=1e-5)


def test_the_model_goes_straight_into_train_py(
    recipe: Path, prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    assert command("--config", recipe, "--output_dir", run_dir) == 0
    said = capsys.readouterr().out
    assert f"train.py --model_name_or_path {run_dir / 'model'} --vocabulary train" in said
    _, info = Wav2Vec2ForPreTraining.from_pretrained(run_dir / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    fine_tuning = write_recipe(tmp_path / "fine.yaml", prepared, model_config=None, max_steps=2)
    forget_processes()
    with training() as fine_tune:
        arguments = ("--model_name_or_path", run_dir / "model", "--output_dir", tmp_path / "fine")
        assert fine_tune("--config", fine_tuning, *arguments) == 0
    said = capsys.readouterr().out
    assert "head: new" in said
    assert "quantizer" in said
    # Pre-training's masks are its own: fine-tuning masks what the checkpoint says.
    assert json.loads((tmp_path / "fine" / "model" / "config.json").read_text())["mask_time_prob"] == 0.05
    card = (run_dir / "model" / "README.md").read_text()
    assert "cannot write before it is fine-tuned" in card


@pytest.mark.slow
def test_a_checkpoint_is_trained_on_and_scored_before(
    recipe: Path, prepared: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """The dev loss at step 0 of a second run is that of the model it begins with."""
    assert command("--config", recipe, "--output_dir", tmp_path / "one") == 0
    forget_processes()
    again = ("--config", recipe, "--model_name_or_path", tmp_path / "one" / "model", "--output_dir", tmp_path / "two")
    assert command(*again, "--max_steps", 2) == 0
    best = json.loads((tmp_path / "one" / "train_results.json").read_text())["best_eval_loss"]
    assert read_log(tmp_path / "two" / "training_log.csv")["eval_loss"][0] == pytest.approx(best, rel=1e-6)


def test_a_collapse_ends_the_run_with_its_reason(
    recipe: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """A codebook whose logits are pulled to one code of each group: the run stops, and says so in one line."""
    original = train.train_step

    def collapsing(run: PretrainingRun, update: object) -> object:
        result = original(run, update)
        if run.state.step >= 2:
            with torch.no_grad():
                run.model.hf.quantizer.weight_proj.bias.view(run.model.num_groups, -1)[:, 0] += 100.0
        return result

    monkeypatch.setattr(train, "train_step", collapsing)
    flags = ("--config", recipe, "--output_dir", tmp_path / "run", "--max_steps", 40, "--eval_steps", 1)
    assert command(*flags) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert "collapsed" in line
    assert "--learning_rate" in line
    log = read_log(tmp_path / "run" / "training_log.csv")
    assert log["step"].iloc[-1] < 40
    assert log["code_perplexity"].iloc[-1] == pytest.approx(2.0, abs=0.05)
    # Its loss was the lowest of all, and it did not become model/.
    assert log["eval_loss"].iloc[-1] < log["eval_loss"].iloc[1]
    best = json.loads((tmp_path / "run" / "model" / "best.json").read_text())
    assert best["best_step"] in (1, 2)
    assert f"model/ is of step {best['best_step']}, before that" in line


def test_codes_that_sleep_through_the_warm_up_are_no_collapse() -> None:
    """And an evaluation of few codes is not kept, however low its loss."""
    history = [
        {"step": step, "code_perplexity": 2.0, "contrastive_loss": 1.0, "accuracy": 0.1}
        for step in range(100, 2001, 100)
    ]
    assert collapse_reason(history, 2, 640, warmup_steps=32_000) is None
    assert "has collapsed" in collapse_reason(history, 2, 640, warmup_steps=500)
    assert not is_sound(4.0, 0.0, num_groups=2)
    assert not is_sound(20.0, 100.0, num_groups=2)
    assert is_sound(30.0, 100.0, num_groups=2)


def test_a_model_that_masks_nothing_in_fine_tuning_is_pre_trained(
    prepared: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """As the demo's: transformers then makes no embedding of masked frames, which the saved weights have."""
    model = MODEL | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    recipe = write_pretraining_recipe(
        tmp_path / "r.yaml", prepared, model_config=model, max_steps=3, max_eval_samples=2
    )
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["mask_time_prob"] == 0.0


def test_promise_3_a_row_that_a_stop_left_to_the_resume_is_the_same(
    recipe: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in an update whose row is due: the resumed run writes it, with the temperature of that update."""
    flags = ("--config", recipe, "--gumbel_temperature_decay", 0.9)
    assert command(*flags, "--output_dir", tmp_path / "whole") == 0
    forget_processes()
    original = train.train_step

    def stopping(run: PretrainingRun, update: object) -> object:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stopping)
        assert command(*flags, "--output_dir", tmp_path / "parts") == 143
    forget_processes()
    assert command(*flags, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "last") == 0
    assert repeatable(tmp_path / "parts") == repeatable(tmp_path / "whole")


def test_the_pass_that_measures_codes_is_done_again_in_smaller_cuts(
    make_run: Callable[..., PretrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = first_update(make_run(per_device_train_batch_size=8))
    run = make_run(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    original, failed = PretrainingModel.code_prob_sum, []

    def failing(model: PretrainingModel, batch: PretrainingBatch) -> torch.Tensor:
        if len(batch.ids) > 2:
            failed.append(len(batch.ids))
            raise MemoryLimitExceeded("asked for")
        return original(model, batch)

    monkeypatch.setattr(PretrainingModel, "code_prob_sum", failing)
    loss, _, counted = first_update(run)
    assert failed[0] == 4
    assert loss == pytest.approx(whole[0], rel=1e-5)
    np.testing.assert_allclose(counted, whole[2], rtol=1e-5)


def test_short_clips_are_left_out_with_a_reason(prepared: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    rows = make_rows(6, seed=4)
    rows[0] = ("tiny", rows[0][1][:700], "a", "ann")  # 44 ms: two frames
    write_part(tmp_path / "more" / "train" / "part_1", rows)
    write_part(tmp_path / "more" / "dev" / "part_1", make_rows(3, seed=5))
    recipe = write_pretraining_recipe(tmp_path / "r.yaml", tmp_path / "more", min_duration_in_seconds=0.01)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    dropped = (tmp_path / "run" / "drop_list.csv").read_text()
    assert "tiny,too_short_to_mask" in dropped


@pytest.mark.slow
def test_the_recipe_runs_on_a_small_checkpoint(
    recipe: Path, prepared: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """configs/pretrain.yaml as it is written, but for the model, the data and the length."""
    assert command("--config", recipe, "--output_dir", tmp_path / "base", "--max_steps", 1) == 0
    forget_processes()
    flags = ("--model_name_or_path", tmp_path / "base" / "model", "--data_dir", prepared)
    flags += ("--min_duration_in_seconds", 0.1, "--max_steps", 3, "--logging_steps", 1, "--dataloader_num_workers", 0)
    path = Path(pretrain.__file__).parent / "configs" / "pretrain.yaml"
    assert command("--config", path, *flags, "--output_dir", tmp_path / "run") == 0
    log = read_log(tmp_path / "run" / "training_log.csv")
    assert log["gumbel_temperature"].dropna().tolist() == [0.5, 0.5, 0.5]
    assert math.isfinite(log["eval_loss"].iloc[-1])


BAD_SETTINGS = {
    "nothing to predict": (("--mask_time_prob", 0), "--mask_time_prob is 0"),
    "no span": (("--mask_time_min_masks", 0), "--mask_time_min_masks is 0"),
    "no distractor": (("--num_negatives", 0), "--num_negatives is 0"),
    "temperature upside down": (("--min_gumbel_temperature", 3), "--min_gumbel_temperature is 3"),
    "decay": (("--gumbel_temperature_decay", 1.5), "--gumbel_temperature_decay is 1.5"),
    "contrast": (("--contrastive_logits_temperature", 0), "--contrastive_logits_temperature is 0"),
    "a setting of train.py": (("--vocabulary", "train"), "--vocabulary"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_line(
    name: str, recipe: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    flags, message = BAD_SETTINGS[name]
    assert command("--config", recipe, "--output_dir", tmp_path / "run", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_family_without_such_an_objective_is_refused_by_name(
    prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    model = TINY_MODEL | {"model_type": "hubert"}
    recipe = write_pretraining_recipe(tmp_path / "r.yaml", prepared, model_config=model)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "'hubert'" in error
    assert "clusters of an earlier model" in error


@pytest.mark.slow
def test_the_other_command_does_not_resume_the_run(
    recipe: Path, prepared: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    with stopped_at("train_step", 3):
        command("--config", recipe, "--output_dir", tmp_path / "run")
    forget_processes()
    before = tree(tmp_path / "run")
    fine_tuning = write_recipe(tmp_path / "fine.yaml", prepared)
    with training() as fine_tune:
        flags = ("--output_dir", tmp_path / "run", "--resume_from_checkpoint", "last")
        assert fine_tune("--config", fine_tuning, *flags) == 2
    assert "is of a run of pretrain.py: resume it with that command" in capsys.readouterr().err
    assert tree(tmp_path / "run") == before
