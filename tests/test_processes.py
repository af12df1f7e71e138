"""What start_processes refuses, how gradients are shared, and that no process outlives its launcher."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from conftest import alone
from torch import nn

import processes
import stopping
from errors import UsageError
from processes import MAX_LOADING_PROCESSES, SharedGradients, choose_loading_processes, start_processes

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER_SETTINGS = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """No launcher, no GPU, and an Accelerator that only notes how it was made."""
    made: list[dict[str, object]] = []

    def accelerator(**settings: object) -> SimpleNamespace:
        made.append(settings)
        return alone()

    for name in LAUNCHER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # Trap 10: accepted in silence, without a scaler, and slow.
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 needs a GPU.*--mixed_precision bf16 or no"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 is not supported"),
        # Trap 11: this variable would beat our own setting.
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps 4 behind train.py"),
    ],
)
def test_settings_of_the_launcher_are_refused_before_anything_starts(
    settings: dict[str, str],
    message: str,
    one_process: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message) as refused:
        start_processes([], "runs/x")
    assert "\n" not in str(refused.value)
    assert one_process == []


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 9: two processes, each of which believes that it is alone, would write the same run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"started 2 processes, and this one sees 1: .*--num_processes"):
        start_processes([], "runs/x")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"distributed_type": DistributedType.FSDP}, "asks for FSDP, which this loop does not do"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "asks for DEEPSPEED, which this loop does not do"),
        ({"backend": DynamoBackend.INDUCTOR}, "torch.compile.*--dynamo_backend no"),
    ],
    ids=["fsdp", "deepspeed", "dynamo"],
)
def test_modes_that_the_loop_would_ignore_are_refused(
    found: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "Accelerator", lambda **_: alone(**found))
    with pytest.raises(UsageError, match=message):
        start_processes([], "runs/x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "FSDP with mixed precision fp16 is not supported"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "set fsdp_cpu_ram_efficient_loading: false"),
        ({}, "asks for FSDP and one process: launch with --num_processes 2"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        start_processes([], "runs/x", may_shard=True)
    with pytest.raises(UsageError, match="asks for FSDP, which only training needs: launch this with --multi_gpu"):
        start_processes([], "runs/x")


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate leaves it out without a word."""
    monkeypatch.setattr(processes, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UsageError, match="--report_to wandb needs a package that is not installed: pip install wandb"):
        start_processes(["tensorboard", "wandb"], "runs/x")


@pytest.mark.parametrize(
    ("has_gpu", "precision"), [(False, "no"), (False, "bf16"), (True, "no"), (True, "bf16"), (True, "fp16")]
)
def test_what_the_launcher_may_ask_for(
    has_gpu: bool, precision: str, one_process: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One owner per knob: precision and accumulation are never passed, so the launcher's stand."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start_processes(["tensorboard"], "runs/x").num_processes == 1
    (settings,) = one_process
    assert settings.pop("kwargs_handlers")[0].timeout.total_seconds() == 1800
    assert settings == {"cpu": not has_gpu, "log_with": ["tensorboard"], "project_dir": "runs/x"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize(("launched", "number"), [(True, signal.SIGTERM), (False, 0)])
def test_the_launchers_end_is_watched_before_torch_is_imported(launched: bool, number: int) -> None:
    """Imports take seconds, in which a launcher may be stopped too. Only a launched process ends with its parent."""
    code = "import ctypes, sys, launched; found = ctypes.c_int(); "
    code += "PR_GET_PDEATHSIG = 2; ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(found)); "
    code += "print(found.value, 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"ACCELERATE_MIXED_PRECISION": "no"} if launched else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(int(number)), "False"], done.stderr
    for program in ("train.py", "evaluate.py", "preflight.py"):
        lines = (REPOSITORY / program).read_text().splitlines()
        imported = [line.split()[1] for line in lines if line.startswith(("import", "from"))]
        assert imported[:4] == ["errors", "allocator", "collector", "launched"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_process_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 26: SIGTERM to the launcher leaves train.py behind as an orphan."""
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        told, ready = os.pipe()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            stopping.end_with_launcher()
            os.write(ready, b"x")
            signal.alarm(60)  # Ends it if the test itself fails.
            while True:
                signal.pause()
        os.read(told, 1)
        os._exit(0)
    os.close(writing)
    os.waitpid(launcher, 0)
    # The worker alone still holds the pipe: end of file means that it is gone.
    assert select.select([reading], [], [], 20)[0], "the worker lives on"
    assert os.read(reading, 1) == b""
    os.close(reading)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))


def test_gradients_of_micro_batches_add_up_in_the_buffer() -> None:
    shared, plain = layers(), layers()
    gradients = SharedGradients(list(shared.parameters()))
    inputs = torch.randn(6, 3)
    plain(inputs).square().sum().backward()
    for piece in inputs.split(2):
        shared(piece).square().sum().backward()
    for ours, theirs in zip(shared.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(gradients.buffer, torch.cat([p.grad.reshape(-1) for p in plain.parameters()]))
    assert gradients.buffer.numel() == sum(parameter.numel() for parameter in shared.parameters())


def test_views_survive_backward_clipping_and_an_optimizer_step() -> None:
    model = layers()
    gradients = SharedGradients(list(model.parameters()))
    places = [parameter.grad.data_ptr() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        gradients.zero()
        assert not any(parameter.grad.any() for parameter in model.parameters())
        model(torch.randn(4, 3)).sum().backward()
        nn.utils.clip_grad_norm_(gradients.parameters, 1e-3)
        assert float(gradients.buffer.norm()) == pytest.approx(1e-3, rel=1e-3)
        optimizer.step()
    assert [parameter.grad.data_ptr() for parameter in model.parameters()] == places


def test_a_layer_that_was_dropped_contributes_zeros() -> None:
    """A dropped layer or an empty cut leaves its part of the buffer as it is: nothing waits for it."""
    model = layers()
    gradients = SharedGradients(list(model.parameters()))
    model[1](model[0](torch.randn(4, 3))).sum().backward()
    assert model[0].weight.grad.any()
    assert not model[2].weight.grad.any()
    assert torch.isfinite(gradients.buffer).all()


def test_one_process_adds_nothing() -> None:
    model = layers()
    gradients = SharedGradients(list(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    before = gradients.buffer.clone()
    gradients.sum_over_processes(SimpleNamespace(num_processes=1), torch.tensor(2.5))
    assert torch.equal(gradients.buffer, before)


def test_several_processes_sum_every_piece_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = SharedGradients(list(layers().parameters()))
    gradients.buffer.copy_(torch.arange(gradients.buffer.numel()))
    sizes = []
    monkeypatch.setattr(processes, "NUMBERS_PER_REDUCTION", 7)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda piece: sizes.append(len(piece)) or piece.mul_(2))
    loss = gradients.sum_over_processes(SimpleNamespace(num_processes=2), torch.tensor(2.5))
    assert loss == 5.0, "the loss travels behind the gradients"
    assert torch.equal(gradients.buffer, 2.0 * torch.arange(gradients.buffer.numel()))
    assert max(sizes) == 7
    assert sum(sizes) == gradients.buffer.numel() + 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_spoils_the_gradients(loss: float) -> None:
    """Otherwise a loss scaler would step on them: it looks at gradients alone."""
    gradients = SharedGradients(list(layers().parameters()))
    gradients.sum_over_processes(SimpleNamespace(num_processes=1), torch.tensor(loss))
    assert not torch.isfinite(gradients.buffer).all()


def test_half_precision_weights_are_our_own_mistake() -> None:
    model = layers()
    model[1].half()
    with pytest.raises(AssertionError, match="fp32"):
        SharedGradients(list(model.parameters()))


@pytest.mark.parametrize(
    ("asked", "device", "cores", "ranks_here", "expected"),
    [
        (-1, "cpu", 64, 1, 1),
        (-1, "cuda", 2, 1, 1),
        (-1, "cuda", 1, 1, 1),
        (-1, "cuda", 4, 1, 3),
        (-1, "cuda", 64, 8, MAX_LOADING_PROCESSES),
        (-1, "cuda", 8, 8, 1),
        (0, "cuda", 64, 1, 0),
        (9, "cpu", 2, 1, 9),
    ],
)
def test_loading_processes_choose_themselves(
    asked: int, device: str, cores: int, ranks_here: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    assert choose_loading_processes(asked, torch.device(device)) == expected
