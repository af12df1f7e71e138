"""Will it fit? The heaviest micro-batch and evaluation batch are run before step 1, and their memory is measured.

Dimension letters: B utterances, S samples, L labels.
"""

import contextlib
import math
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import allocator
from audio import SAMPLE_RATE_HZ
from data import EVENNESS, Batch, CutSettings
from findings import Finding
from model import masked_axes, num_frames
from recovery import MemoryLimitExceeded, is_out_of_memory, release_memory, trim_memory

# Of the room that batches have. Allocators lose a few percent to shapes that vary, and gradients travel in pieces.
MARGIN = 0.10
# The search for --max_batch_seconds ends when it knows the limit to this share.
SEARCH_PRECISION = 0.08
SECONDS_FOR_A_TOOL = 10
MEGABYTE = 1e6
# Docs of Linux: admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Above this share of a limit the heap gives back what it keeps before a pass.
HEAP_SHARE = 0.8
CLEAR_PEAK = "5"  # man 5 proc: what clear_refs takes to reset VmHWM


@dataclass(frozen=True, order=True)
class Shape:
    """A padded micro-batch: B rows of S samples."""

    rows: int
    samples: int

    @property
    def padded_samples(self) -> int:
        """What grows the memory of everything but attention."""
        return self.rows * self.samples

    def __str__(self) -> str:
        return f"{self.rows} x {self.samples / SAMPLE_RATE_HZ:.1f} s"


def heaviest_shapes(num_samples: np.ndarray, rows_per_update: int, cut: CutSettings) -> list[Shape]:
    """The largest micro-batches that any epoch can bring, whatever its order: nothing later is heavier.

    Convolutions and feed-forward layers grow with rows x longest row, attention with the square of the longest row:
    the shape with the most padded samples comes first, then the one with the longest row, where that is another.

    Args:
        num_samples: lengths of all utterances that take part, [N].
        rows_per_update: utterances that are cut together; N for an evaluation.
        cut: limits of a micro-batch.
    """
    longest = int(num_samples.max())
    rows_at_most = min(rows_per_update, len(num_samples))
    if cut.max_batch_samples is None:
        rows_per_rank = math.ceil(rows_at_most / cut.num_processes)
        return [Shape(min(cut.max_utterances, rows_per_rank), longest)]
    lengths = np.unique(num_samples).astype(np.int64)[::-1]
    # The ranks share evenly: each chunk stays under the smallest limit that makes one for every rank, to EVENNESS.
    even_share = math.ceil(rows_at_most / cut.num_processes) * longest / (1 - EVENNESS)
    limit = min(cut.max_batch_samples, even_share) if cut.num_processes > 1 else cut.max_batch_samples
    rows = np.clip(limit // np.maximum(lengths, 1), 1, rows_at_most).astype(np.int64)
    heaviest = int(np.argmax(rows * lengths))  # The first of equals has the longer rows.
    shapes = [Shape(int(rows[heaviest]), int(lengths[heaviest])), Shape(int(rows[0]), longest)]
    return list(dict.fromkeys(shapes))


@dataclass(frozen=True)
class Passes:
    """How a run passes a batch through its model, without the run.

    Attributes:
        train: forward and backward of one micro-batch, gradients added up.
        evaluate: forward, decoding and counting of one batch.
        clean: forgets the gradients.
        vocabulary_size: number of labels, for labels that are as good as any.
        blank_id: the label that no reference has.
        hf_config: of the encoder.
        device: where the model lies.
        bytes_per_value: of an activation, by the launcher's precision.
        is_divided: the others wait in the midst of a pass for this process, so that one that fails ends the run (FSDP).
    """

    train: Callable[[Batch], None]
    evaluate: Callable[[Batch], None]
    clean: Callable[[], None]
    vocabulary_size: int
    blank_id: int
    hf_config: object
    device: torch.device
    bytes_per_value: int = 4
    is_divided: bool = False

    def least_bytes(self, shape: Shape) -> int:
        """What any pass needs at the very least: input and output of the first activation, and a padded batch's mask.

        Without a GPU a pass that asks for more than there is does not fail, the kernel kills the process.
        """
        config = self.hf_config
        first = num_frames(shape.samples, config.conv_kernel[:1], config.conv_stride[:1]) * config.conv_dim[0]
        frames = num_frames(shape.samples, config.conv_kernel, config.conv_stride)
        mask = frames**2 if shape.rows > 1 else 0
        return shape.rows * (2 * self.bytes_per_value * first + mask)

    def make_batch(self, shape: Shape) -> Batch:
        """Noise of this shape, its last row a sample shorter (a padded batch takes more memory), and random labels."""
        generator = torch.Generator().manual_seed(0)
        lengths = [shape.samples] * (shape.rows - 1) + [shape.samples - (shape.rows > 1)]
        frames = [num_frames(length, self.hf_config.conv_kernel, self.hf_config.conv_stride) for length in lengths]
        # Half as many labels as frames is more than anyone speaks, and can be aligned.
        num_labels = [count // 2 for count in frames]
        labels_L = torch.randint(self.vocabulary_size - 1, (sum(num_labels),), generator=generator)
        input_values_BS = torch.randn(shape.rows, shape.samples, generator=generator)
        input_values_BS[-1, lengths[-1] :] = 0.0
        mask_BT, mask_BH = self._masks(shape.rows, max(frames))
        return Batch(
            ids=[f"probe {row}" for row in range(shape.rows)],
            rows=np.arange(shape.rows),
            texts=[""] * shape.rows,
            raw_texts=[""] * shape.rows,
            input_values_BS=input_values_BS,
            sample_lengths_B=torch.tensor(lengths),
            frame_lengths_B=torch.tensor(frames),
            labels_L=labels_L + (labels_L >= self.blank_id),
            label_lengths_B=torch.tensor(num_labels),
            time_mask_BT=mask_BT,
            feature_mask_BH=mask_BH,
        )

    def _masks(self, rows: int, frames: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        config = self.hf_config
        masks_time, masks_features = masked_axes(config)
        time = torch.zeros(rows, frames, dtype=torch.bool) if masks_time else None
        feature = torch.zeros(rows, config.hidden_size, dtype=torch.bool) if masks_features else None
        return time, feature


@dataclass(frozen=True)
class Probe:
    """What a shape needed.

    Attributes:
        shape: of the batch.
        peak_bytes: most memory of this process while it ran, all else that the process holds included.
        fits: whether it stayed within the limit.
    """

    shape: Shape
    peak_bytes: int
    fits: bool


def probe(passes: Passes, shape: Shape, is_training: bool, limit_bytes: float) -> Probe:
    """Run one batch as the run would, and leave weights, moments, scaler, gradients and random state as they were.

    A batch that cannot fit by its size alone is not run.
    """
    if passes.least_bytes(shape) > limit_bytes:
        return Probe(shape, passes.least_bytes(shape), fits=False)
    devices = [passes.device] if passes.device.type == "cuda" else []
    run_pass = passes.train if is_training else passes.evaluate
    batch = passes.make_batch(shape)
    trim_memory()
    with torch.random.fork_rng(devices=devices), PeakMemory(passes.device) as peak:
        fits = _survives(run_pass, batch, passes.is_divided)
        if passes.device.type == "cuda":
            torch.cuda.synchronize(passes.device)
    passes.clean()
    del batch
    if not fits:
        release_memory()
    return Probe(shape, peak.bytes, fits and peak.bytes <= limit_bytes)


def _survives(run_pass: Callable[[Batch], None], batch: Batch, is_divided: bool) -> bool:
    try:
        run_pass(batch)
    except (RuntimeError, MemoryError) as error:
        if is_divided or not is_out_of_memory(error):
            raise
        return False
    return True


def search_max_batch_seconds(
    fits: Callable[[float], tuple[bool, float]], shortest: float, longest: float, base: float, limit: float
) -> float | None:
    """The largest budget of padded seconds that fits, to SEARCH_PRECISION; None when not even `shortest` does.

    Args:
        fits: runs the heaviest batches under a budget: whether they fit, and the peak in bytes.
        shortest: the longest clip; no budget can be less.
        longest: a whole update in one micro-batch; no budget can be of more use.
        base: bytes in use before any batch.
        limit: bytes that there are. A budget that would need more by its size alone is not tried: without a GPU the
            kernel kills a process that asks for too much.
    """
    does_fit, peak = fits(shortest)
    if not does_fit:
        return None
    good, bad = shortest, math.inf
    while good < longest and bad / good > 1 + SEARCH_PRECISION:
        candidate = min(2 * good if bad == math.inf else (good + bad) / 2, longest)
        expected = base + (peak - base) * candidate / good
        does_fit, found = fits(candidate) if expected <= limit else (False, peak)
        if does_fit:
            good, peak = candidate, found
        else:
            bad = candidate
    return math.floor(good * 10) / 10


class PeakMemory:
    """The most memory that this process uses inside the block: `bytes` after it.

    The CUDA allocator's peak, or the process' peak resident memory (VmHWM, which Linux can reset; elsewhere the peak
    since the process began), less the mapped files' as in `used_bytes`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = peak_bytes(self.device) - _mapped_file_bytes(self.device)


def peak_bytes(device: torch.device) -> int:
    """Most memory since the start or since the last PeakMemory: of the GPU's allocator, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _proc_status()
    if "VmHWM" in status:
        return status["VmHWM"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def used_bytes(device: torch.device) -> int:
    """Memory in use now. Pages of mapped files are not counted (trap 31): the system takes them back when it likes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _proc_status().get("VmRSS", peak_bytes(device)) - _mapped_file_bytes(device)


def _mapped_file_bytes(device: torch.device) -> int:
    """Resident pages of the program's own files and of the shards, on the CPU."""
    return 0 if device.type == "cuda" else _proc_status().get("RssFile", 0)


def limit_allocator(device: torch.device, memory_limit_mb: float | None) -> None:
    """From here on a GPU's allocator itself refuses more than --memory_limit_mb."""
    if device.type == "cuda" and memory_limit_mb is not None:
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit_mb * MEGABYTE / total), device)


def limit_bytes(device: torch.device, memory_limit_mb: float | None) -> float:
    """What this process may use: --memory_limit_mb, or what is free plus what it holds already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        available = free + torch.cuda.memory_reserved(device)
        limit_allocator(device, memory_limit_mb)
        return min(available, memory_limit_mb * MEGABYTE if memory_limit_mb is not None else math.inf)
    available = _available_host_bytes()
    return available if memory_limit_mb is None else min(available, memory_limit_mb * MEGABYTE)


class MemoryLimit:
    """--memory_limit_mb while training and evaluating; without a GPU, whose allocator keeps it, nothing else does.

    Attributes:
        highest_bytes: the largest peak that was looked at, since looking at one resets it.
    """

    def __init__(self, device: torch.device, memory_limit_mb: float | None) -> None:
        limit_allocator(device, memory_limit_mb)
        self.device, self.limit_mb = device, memory_limit_mb
        self.is_watched = memory_limit_mb is not None and device.type != "cuda"
        self.highest_bytes = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """A pass of one batch.

        Raises:
            MemoryLimitExceeded: it used more.
        """
        if not self.is_watched:
            yield
            return
        if used_bytes(self.device) > HEAP_SHARE * self.limit_mb * MEGABYTE:
            # What the heap keeps for later is resident too, and no reason to cut a batch.
            trim_memory()
        self.highest_bytes = max(self.highest_bytes, peak_bytes(self.device))
        with PeakMemory(self.device) as peak:
            yield
        if peak.bytes > self.limit_mb * MEGABYTE:
            raise MemoryLimitExceeded(f"{peak.bytes / MEGABYTE:.0f} MB in use, --memory_limit_mb {self.limit_mb:g}")


def describe_gpu(device: torch.device) -> Finding | None:
    """Free and total memory, who holds the rest, and the settings in force; None without a GPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = _gpu_processes()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    result = (
        f"{torch.cuda.get_device_name(device)}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free; CUDA_VISIBLE_DEVICES "
        f"{visible}; {allocator.describe()}"
    )
    facts = {"free_bytes": free, "total_bytes": total, "processes": others, "cuda_visible_devices": visible}
    if not others:
        return Finding("gpu", result, facts=facts)
    held = "; ".join(others)
    return Finding("gpu", f"{result}; held by {held}", "warning", "end those, or choose another GPU", facts)


def usable_bytes(limit: float, base: float) -> float:
    """What a batch may bring the process to: all but MARGIN of the room between `base` and `limit`."""
    return limit - MARGIN * max(limit - base, 0.0)


def judge(name: str, probes: list[Probe], limit: float, base: float, remedy: str, device: torch.device) -> Finding:
    """The verdict on the heaviest batches of one kind of work.

    Args:
        name: of the check.
        probes: what was run; the peak is that of the heaviest.
        limit: bytes that there are.
        base: bytes in use without a batch.
        remedy: what helps when it does not fit.
        device: where it ran.
    """
    heaviest = max(probes, key=lambda one: one.peak_bytes)
    broken = [one for one in probes if not one.fits]
    kind = "GPU" if device.type == "cuda" else "process"
    headroom = limit - heaviest.peak_bytes
    shape = (broken or [heaviest])[0].shape
    result = (
        f"heaviest batch {shape}: peak {heaviest.peak_bytes / MEGABYTE:,.0f} MB of the {kind}, "
        f"limit {limit / MEGABYTE:,.0f} MB, headroom {headroom / MEGABYTE:,.0f} MB"
    )
    facts = {
        "shape": [heaviest.shape.rows, heaviest.shape.samples],
        "base_bytes": base,
        "peak_bytes": heaviest.peak_bytes,
        "limit_bytes": limit,
        "headroom_bytes": headroom,
    }
    if broken:
        return Finding(name, f"does not fit: {result}", "refused", remedy, facts)
    if heaviest.peak_bytes > usable_bytes(limit, base):
        return Finding(name, f"fits barely: {result}", "warning", remedy, facts)
    return Finding(name, result, facts=facts)


def under_budget(cut: CutSettings, max_batch_seconds: float) -> CutSettings:
    """The same rank's cuts by seconds."""
    return replace(cut, max_batch_seconds=max_batch_seconds)


def _available_host_bytes() -> float:
    """What this process holds, and its share of what is free: of the machine, or of the control group if less."""
    meminfo = _read_table(Path("/proc/meminfo"))
    available = meminfo.get("MemAvailable", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for folder, limit_name, used_name, inactive_name in CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Pages of files that nobody is using count as used, and give way.
            available = min(available, limit - used + int(stat.get(inactive_name, 0)))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(available, 0) / processes + used_bytes(torch.device("cpu"))


def _proc_status() -> dict[str, int]:
    return _read_table(Path("/proc/self/status"))


def _read_table(path: Path) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file of /proc, in bytes; empty where there is none."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0]) * 1024
    return found


def _gpu_processes() -> list[str]:
    """Other processes with memory on the visible GPUs, as nvidia-smi names them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_A_TOOL)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [line for line in lines if line and not _is_of_this_run(line.split(",")[0])]


def _is_of_this_run(pid: str) -> bool:
    """This process, or another rank: a child of the same launcher."""
    if pid == str(os.getpid()):
        return True
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    with contextlib.suppress(OSError, IndexError):
        # man 5 proc: the parent follows the state, behind the name in parentheses.
        return is_launched and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getppid())
    return False


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """`model.eval()` for the block, without a graph."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
