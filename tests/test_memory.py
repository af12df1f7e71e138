"""The heaviest batches, what they need, and that finding out changes nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_GROUP_NORM_MODEL, TINY_MODEL

import memory
from assembly import Assembly
from config import TrainConfig
from data import BatchPlan, CutSettings, cut_update
from memory import MEGABYTE, PeakMemory, Probe, Shape, heaviest_shapes, judge, probe, search_max_batch_seconds
from processes import start_processes

CPU = torch.device("cpu")
RATE = 16_000


# --- The heaviest shapes -------------------------------------------------------------------------------------------


def shapes_of_epochs(plan: BatchPlan, cut: CutSettings, epochs: int) -> list[Shape]:
    """Brute force: every micro-batch of every rank."""
    found = set()
    for _, _, positions in plan.updates(0, epochs * plan.updates_per_epoch):
        lengths = plan.num_samples[positions]
        for of_rank in cut_update(lengths, cut.num_processes, cut.max_utterances, cut.max_batch_samples):
            found |= {Shape(len(rows), int(lengths[rows].max())) for rows in of_rank if len(rows)}
    return sorted(found)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize(
    ("max_utterances", "seconds"), [(4, None), (1, None), (16, None), (8, 6.0), (8, 12.5), (8, 90.0), (8, 999.0)]
)
@pytest.mark.parametrize("size", [8, 24])
def test_promise_5_no_epoch_brings_anything_heavier(
    num_processes: int, max_utterances: int, seconds: float | None, size: int
) -> None:
    rng = np.random.default_rng(0)
    num_samples = np.clip(rng.lognormal(1.5, 0.5, 200), 0.3, 12.0) * RATE
    plan = BatchPlan(np.arange(200), num_samples.astype(np.int32), size, seed=1)
    cut = CutSettings(0, num_processes, max_utterances, seconds)
    shapes, found = heaviest_shapes(plan.num_samples, size, cut), shapes_of_epochs(plan, cut, epochs=12)
    assert max(shape.padded_samples for shape in found) <= shapes[0].padded_samples
    assert max(shape.samples for shape in found) == max(shape.samples for shape in shapes)
    longest = [shape for shape in found if shape.samples == shapes[-1].samples]
    assert max(shape.rows for shape in longest) <= shapes[-1].rows
    if seconds is None and num_processes == 1 and (size % max_utterances == 0 or size < max_utterances):
        assert shapes == [max(found, key=lambda shape: shape.padded_samples)], "and it does occur"
    elif seconds is not None:
        # By seconds a little is lost to updates that hold too few clips of the worst length.
        assert max(shape.padded_samples for shape in found) > 0.8 * shapes[0].padded_samples


def test_one_clip_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    lengths = np.array([2, 2, 2, 9]) * RATE
    assert heaviest_shapes(lengths, 4, CutSettings(0, 1, 8, 6.0)) == [Shape(1, 9 * RATE)]
    assert heaviest_shapes(lengths, 4, CutSettings(0, 1, 8, 10.0)) == [Shape(1, 9 * RATE)]
    assert heaviest_shapes(lengths, 4, CutSettings(0, 1, 8, 20.0)) == [Shape(2, 9 * RATE)]


def test_evaluation_is_cut_as_one() -> None:
    lengths = np.full(70, RATE)
    assert heaviest_shapes(lengths, 70, CutSettings(0, 1, 32)) == [Shape(32, RATE)]
    assert heaviest_shapes(lengths[:5], 5, CutSettings(0, 1, 32)) == [Shape(5, RATE)]


# --- Probing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def assemble(prepared: Path, tmp_path: Path) -> Callable[..., Assembly]:
    def make(**settings: object) -> Assembly:
        config = TrainConfig(
            **{
                "data_dir": str(prepared), "output_dir": str(tmp_path / "run"), "model_config": TINY_MODEL,
                "vocabulary": "train", "freeze_feature_encoder": False,
            } | settings
        )  # fmt: skip
        assembly = Assembly(config, start_processes([], config.output_dir))
        assembly.plan_updates(8)
        return assembly

    return make


def state_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    """Everything that a run computes with, copied."""
    state = {f"weight {name}": value.clone() for name, value in assembly.model.state_dict().items()}
    for index, moments in enumerate(assembly.optimizer.optimizer.state.values()):
        state |= {f"moment {index} {name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    state["gradients"] = assembly.gradients.buffer.clone()
    state["random state"] = torch.get_rng_state()
    if assembly.accelerator.scaler is not None:
        state["scale"] = torch.tensor(assembly.accelerator.scaler.get_scale())
    return state


DROPOUT = {"hidden_dropout": 0.3, "layerdrop": 0.5, "mask_time_prob": 0.4, "mask_time_length": 2,
           "mask_feature_prob": 0.3, "mask_feature_length": 4}  # fmt: skip


@pytest.mark.parametrize("is_scaled", [False, True], ids=["fp32", "loss_scaler"])
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("architecture", [TINY_MODEL, TINY_GROUP_NORM_MODEL], ids=["layer_norm", "group_norm"])
def test_probe_leaves_everything_as_it_was(
    assemble: Callable[..., Assembly], architecture: dict[str, object], is_training: bool, is_scaled: bool
) -> None:
    assembly = assemble(model_config=architecture | DROPOUT)
    if is_scaled:
        assembly.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, was_training = state_of(assembly), assembly.model.training
    probe(assembly.passes, Shape(3, 9_000), is_training, np.inf)
    after = state_of(assembly)
    assert before.keys() == after.keys()
    assert any(name.startswith("moment") for name in before), "the moments are in place before step 1"
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert is_training or assembly.model.training == was_training
    assert all(value == 0 for name, value in after.items() if name.endswith(" step"))


def test_probe_runs_the_very_shape_padding_included(
    assemble: Callable[..., Assembly], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly, seen = assemble(), []
    original = assembly.model.forward

    def forward(values_BS: torch.Tensor, lengths_B: torch.Tensor, *masks: object) -> tuple[torch.Tensor, ...]:
        seen.append((tuple(values_BS.shape), lengths_B.tolist(), torch.is_grad_enabled()))
        return original(values_BS, lengths_B, *masks)

    monkeypatch.setattr(assembly.model, "forward", forward)
    probe(assembly.passes, Shape(3, 9_000), True, np.inf)
    probe(assembly.passes, Shape(1, 9_000), False, np.inf)
    assert seen == [((3, 9_000), [9_000, 9_000, 8_999], True), ((1, 9_000), [9_000], False)]


def test_probe_says_when_memory_runs_out_and_passes_other_errors_on(
    assemble: Callable[..., Assembly], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble()
    before = state_of(assembly)
    error: Exception = torch.OutOfMemoryError("CUDA out of memory.")

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        raise error

    monkeypatch.setattr(assembly.accelerator, "backward", backward)
    assert not probe(assembly.passes, Shape(3, 9_000), True, np.inf).fits
    assert all(torch.equal(value, state_of(assembly)[name]) for name, value in before.items())
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        probe(assembly.passes, Shape(3, 9_000), True, np.inf)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_is_that_of_the_block() -> None:
    """300 MB inside, after 600 MB before it that are gone."""
    torch.ones(75_000_000 * 2).sum()
    used = memory.used_bytes(CPU)
    with PeakMemory(CPU) as peak:
        torch.ones(75_000_000).sum()
    assert 280 < (peak.bytes - used) / MEGABYTE < 400


def test_peak_grows_with_the_batch(assemble: Callable[..., Assembly]) -> None:
    assembly = assemble(model_config=TINY_MODEL | {"conv_dim": [64, 64]})
    probe(assembly.passes, Shape(1, 16_000), True, np.inf)
    small, large = (probe(assembly.passes, Shape(rows, 200_000), True, np.inf).peak_bytes for rows in (2, 8))
    assert large - small > 6 * 200_000 / 20 * 64 * 4 * 2, "at least the first layer's input and output"
    assert not probe(assembly.passes, Shape(8, 200_000), True, large / 2).fits


def test_what_cannot_fit_by_its_size_is_not_run(
    assemble: Callable[..., Assembly], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an hour of audio in a batch of eight: the kernel would kill the process."""
    assembly = assemble()
    monkeypatch.setattr(assembly.model, "forward", None)
    found = probe(assembly.passes, Shape(8, 1_800 * RATE), False, 1e9)
    # 1.44 million frames of the first layer with 16 channels, in and out; 90,000 frames squared.
    assert (found.fits, found.peak_bytes) == (False, 8 * (2 * 4 * 1_440_000 * 16 + 90_000**2))


# --- The search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_second", [10.0, 33.0, 250.0, 900.0])
@pytest.mark.parametrize("bends", [0.0, 0.5])
def test_search_finds_the_largest_budget_that_fits(per_second: float, bends: float) -> None:
    """Against a device whose memory grows linearly, or faster; never more than fits, at most 8 % less."""
    base, limit, tried = 1_000.0, 20_000.0, []

    def needs(seconds: float) -> float:
        return base + per_second * seconds * (1 + bends * seconds / 100)

    def fits(seconds: float) -> tuple[bool, float]:
        tried.append(seconds)
        return needs(seconds) <= limit, min(needs(seconds), limit)

    found = search_max_batch_seconds(fits, 10.0, 600.0, base, limit)
    assert needs(found) <= limit
    assert found == 600.0 or needs(found * 1.09 + 0.1) > limit
    assert len(tried) < 14
    if not bends:
        assert all(needs(seconds) <= limit for seconds in tried), "what is too much by its size alone is not tried"


def test_search_gives_up_when_one_clip_does_not_fit() -> None:
    assert search_max_batch_seconds(lambda _: (False, 0.0), 10.0, 600.0, 0.0, 1.0) is None


# --- Limits and verdicts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peak", "fits", "verdict", "words"),
    [
        (500, True, "ok", "heaviest batch 2 x 1.0 s: peak 500 MB of the process, limit 1,000 MB, headroom 500 MB"),
        (919, True, "ok", "headroom 81 MB"),
        (921, True, "warning", "fits barely"),
        (1_200, False, "refused", "does not fit"),
    ],
)
def test_promise_5_verdict_on_memory(peak: int, fits: bool, verdict: str, words: str) -> None:
    finding = judge("memory", [Probe(Shape(2, RATE), peak * 10**6, fits)], 1e9, 2e8, "do something", CPU)
    assert (finding.verdict, words in finding.result) == (verdict, True)
    assert finding.facts["headroom_bytes"] == 1e9 - peak * 10**6
    assert (finding.remedy == "do something") == (verdict != "ok")


def test_limit_without_a_gpu_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.limit_bytes(CPU, 123.0) == 123e6
    free = memory.limit_bytes(CPU, None)
    assert 1e8 < free < 1e14
    assert memory.limit_bytes(CPU, 1e9) < 1e14, "more than there is cannot be allowed"
    # The ranks of a machine share what is free.
    monkeypatch.setattr(memory, "_read_table", lambda _: {"MemAvailable": 8 * 10**9, "VmRSS": 10**9})
    monkeypatch.setattr(memory, "CONTROL_GROUPS", ())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.limit_bytes(CPU, None) == 2e9 + 1e9


def test_a_control_group_limits_less_its_idle_file_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("memory.max", "4000000000\n"), ("memory.current", "3000000000\n"),
        ("memory.stat", "anon 500000000\ninactive_file 2000000000\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_read_table", lambda _: {"MemAvailable": 8 * 10**9, "VmRSS": 10**8})
    monkeypatch.setattr(memory, "CONTROL_GROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    assert memory.limit_bytes(CPU, None) == 3e9 + 1e8
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.limit_bytes(CPU, None) == 8e9 + 1e8


def test_limit_is_kept_in_a_pass_that_frees_what_it_used() -> None:
    used = memory.used_bytes(CPU) / 1e6
    limit = memory.MemoryLimit(CPU, used + 300)
    with limit.watch():
        del (some := [torch.ones(25_000_000)])[:]
    with pytest.raises(memory.MemoryLimitExceeded, match=r"MB in use, --memory_limit_mb "), limit.watch():
        some = torch.ones(125_000_000)
        del some
    with limit.watch():
        pass
    assert memory.MemoryLimit(CPU, None).is_watched is False


def test_pages_of_mapped_shards_are_not_memory_in_use(tmp_path: Path) -> None:
    """Trap 31: they look like growth, and the system takes them back when it likes."""
    np.zeros(100_000_000, np.uint8).tofile(tmp_path / "shard")
    limit = memory.MemoryLimit(CPU, memory.used_bytes(CPU) / 1e6 + 50)
    mapped = np.memmap(tmp_path / "shard", np.uint8, "r")
    with limit.watch():
        assert int(mapped[::512].sum()) == 0
    before = memory.used_bytes(CPU)
    del mapped
    assert abs(memory.used_bytes(CPU) - before) < 50e6


@pytest.mark.gpu
def test_peak_and_limit_on_a_gpu_are_the_allocators(assemble: Callable[..., Assembly]) -> None:
    assembly = assemble()
    device = assembly.accelerator.device
    try:
        assert memory.limit_bytes(device, 200.0) == 200e6
        small = probe(assembly.passes, Shape(2, 16_000), True, 200e6)
        large = probe(assembly.passes, Shape(8, 16_000_000), True, 200e6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert small.fits
    assert 0 < small.peak_bytes < 200e6
    assert not large.fits


def test_gpu_is_described_with_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answers of a GPU put into torch's and nvidia-smi's mouths."""
    assert memory.describe_gpu(CPU) is None
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 10**9, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 4090 Laptop")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(memory, "_gpu_processes", lambda: ["4711, python train.py, 10900 MiB"])
    finding = memory.describe_gpu(cuda)
    assert finding.verdict == "warning"
    for words in ("5.0 of 16.0 GB free", "CUDA_VISIBLE_DEVICES 1", "4711, python train.py, 10900 MiB", "ALLOC_CONF="):
        assert words in finding.result
    monkeypatch.setattr(memory, "_gpu_processes", list)
    assert memory.describe_gpu(cuda).verdict == "ok"
