"""Checks before step 1: will this run work, and will its numbers mean something?

    python preflight.py --data_dir data/en --model_name_or_path facebook/wav2vec2-large-960h
    python preflight.py --config configs/english_large.yaml --strict
    accelerate launch --mixed_precision fp16 preflight.py --config configs/english_large.yaml

The flags are those of train.py, which makes the same checks before its first step. Prints one screen, and writes
preflight.json, drop_list.csv (what training leaves out) and suspects.csv into --output_dir, or into DATA_DIR/preflight
where none is named or a run lies there. Status 0: train.py would begin, warnings are shown; 2: refused.
"""

from errors import RunFailed, UsageError, exit_status

# isort: split

import allocator  # noqa: F401 - before torch
import collector  # before torch
import launched  # noqa: F401 - before torch

# isort: split

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich import box
from rich.table import Table
from rich.text import Text

from atomic import free_bytes, nearest_existing, write_atomically
from audio import SAMPLE_RATE_HZ
from averaging import AVERAGE_FOLDER
from config import PreflightConfig, parse_arguments
from data import CutSettings, cut_update
from findings import Finding, worst_verdict
from hosts import check_hosts_agree
from memory import (
    Probe,
    Shape,
    describe_gpu,
    heaviest_shapes,
    judge,
    limit_bytes,
    probe,
    search_max_batch_seconds,
    under_budget,
    usable_bytes,
    used_bytes,
)
from model import parameter_counts
from processes import RankStatus, naming_lost_processes, start_processes
from progress import print_table
from recovery import failing_by_name, release_memory
from selection import COUNT_CHECK, write_drop_list, write_suspects

if TYPE_CHECKING:
    from foundation import Foundation

collector.wake()

REPORT_FILES = ("preflight.json", "drop_list.csv", "suspects.csv")
BYTES_PER_WEIGHT = 4
# Cutting an update takes 50 microseconds; so many of them tell what an epoch is like.
UPDATES_CUT = 1_000
# Of the table where no terminal says how wide it is.
VERDICT_STYLES = {"ok": "green", "warning": "yellow", "refused": "bold red"}
# Of a divided model (FSDP) whose pass ran out of memory.
DIVIDED_REMEDY = "lower --per_device_train_batch_size, give --gradient_checkpointing, or launch more processes"


@dataclass(frozen=True)
class Report:
    """What the checks found, the same on every rank.

    Attributes:
        findings: one per check.
        utterances: lines that show the first utterances as text, ids and text again.
        max_batch_seconds: the budget of a micro-batch, found when it was `auto`.
    """

    findings: tuple[Finding, ...]
    utterances: tuple[str, ...]
    max_batch_seconds: float | None

    def refuse(self, is_strict: bool, goes_on: bool = False) -> None:
        """Stop where a check refuses.

        Args:
            is_strict: stop where one warns, too.
            goes_on: --preflight warn: stop only where no clip is left to train on.

        Raises:
            UsageError: with each of these checks, what it found and the remedy.
        """
        stopping = ("refused", "warning") if is_strict else ("refused",)
        bad = [finding for finding in self.findings if finding.verdict in stopping]
        if goes_on:
            bad = [finding for finding in bad if finding.check == COUNT_CHECK]
        if bad:
            listed = "; ".join(f"{finding.check}: {finding.result}: {finding.remedy}" for finding in bad)
            raise UsageError(f"preflight refuses: {listed}")


def main() -> None:
    """The command."""
    from assembly import Assembly

    config = parse_arguments(PreflightConfig, sys.argv[1:], __doc__)
    folder = choose_report_folder(config)
    accelerator = start_processes(config.report_to, str(folder), config.ddp_timeout, may_shard=True)
    try:
        with naming_lost_processes():
            check_hosts_agree(RankStatus(accelerator, config.ddp_timeout), config)
            assembly = Assembly(config, accelerator)
            assembly.plan_updates(assembly.utterances_per_update)
            report = run_checks(assembly)
        if assembly.is_main:
            print_report(report)
            _write_and_say(folder, report, assembly)
        report.refuse(config.strict, goes_on=config.preflight == "warn" and not config.strict)
        if assembly.is_main:
            print(ENDINGS[worst_verdict(report.findings)], flush=True)
    finally:
        accelerator.end_training()


ENDINGS = {
    "ok": "ready",
    "warning": "ready, with warnings",
    "refused": "refused, and train.py goes on all the same: --preflight warn",
}


def choose_report_folder(config: PreflightConfig) -> Path:
    """Where the report goes; looked at before the checks, which take their time.

    Raises:
        UsageError: it cannot be written.
    """
    folder = Path(config.output_dir) if config.output_dir else None
    if folder is None or holds_run(folder):
        folder = config.data_dirs[0] / "preflight"
    if trouble := _trouble_with(folder):
        raise UsageError(f"{trouble}: name a folder for the report with --output_dir")
    return folder


def holds_run(folder: Path) -> bool:
    """Whether a run has begun there; its drop list is what that run left out, and stays."""
    return any((folder / name).exists() for name in ("training_log.csv", "checkpoints"))


def _trouble_with(folder: Path) -> str | None:
    """What keeps a folder from being made and written into."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        return f"{existing} is a file"
    return None if os.access(existing, os.W_OK) else f"{existing} cannot be written to"


def _write_and_say(folder: Path, report: Report, assembly: "Foundation") -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(folder, report, assembly)
    except (OSError, RunFailed) as error:
        raise UsageError(f"the report above is not written: {error}: name another folder with --output_dir") from error
    named = assembly.config.output_dir
    why = f"{named} holds a run, whose own report stays: " if named and Path(named) != folder else ""
    print(f"{why}written to {folder}: {', '.join(REPORT_FILES)}", flush=True)


def run_checks(assembly: "Foundation") -> Report:
    """All checks; every rank takes part, and all get the same report.

    Weights, moments, scaler, gradients and random state of `assembly` are as before afterwards; its
    `max_batch_seconds` is set where the settings say `auto`.
    """
    findings, utterances = assembly.check_data()
    findings += check_precision(assembly.accelerator.mixed_precision, assembly.accelerator.device)
    if len(assembly.selection.rows):  # Else there is no batch to try and nothing to divide.
        findings += [*check_memory(assembly), check_ranks(assembly)]
    findings.append(_check_disk_of_run(assembly))
    return Report(tuple(findings), tuple(utterances), assembly.max_batch_seconds)


def check_precision(mixed_precision: str, device: torch.device) -> list[Finding]:
    """A warning where bf16 is emulated: right, and on a processor some fifty times slower than fp32."""
    if mixed_precision != "bf16" or device.type not in ("cpu", "cuda"):
        return []
    if device.type == "cuda":
        has_instructions, instead = torch.cuda.is_bf16_supported(including_emulation=False), "fp16"
    else:
        has_mkldnn = torch.backends.mkldnn.is_available()
        has_instructions, instead = has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported(), "no"
    if has_instructions:
        return []
    what = "GPU" if device.type == "cuda" else "processor"
    result = f"bf16, for which this {what} has no instructions: slower than fp32"
    return [Finding("precision", result, "warning", f"launch with --mixed_precision {instead}")]


def check_memory(assembly: "Foundation") -> list[Finding]:
    """Run the heaviest batches of training and of evaluation on every rank; search the budget where it is `auto`."""
    accelerator, device = assembly.accelerator, assembly.accelerator.device
    gpu = describe_gpu(device)
    # The same limit everywhere, so that all ranks go the same way.
    limit = _extreme(accelerator, limit_bytes(device, assembly.config.memory_limit_mb), largest=False)
    base = _base_bytes(assembly)
    findings = [gpu] if gpu else []
    measured: dict[bool, list[Probe]] = {}
    if assembly.config.max_batch_seconds == "auto":
        finding, measured = _set_budget(assembly, limit, base)
        findings.append(finding)
    for name, shapes, is_training in (
        ("memory training", _training_shapes(assembly, assembly.cut), True),
        ("memory evaluation", _evaluation_shapes(assembly, assembly.eval_cut), False),
    ):
        probes = measured.get(is_training) or [_probe_everywhere(assembly, one, is_training, limit) for one in shapes]
        fits = all(one.fits for one in probes)
        remedy = _memory_remedy(assembly, limit, is_training, fits)
        findings.append(judge(name, probes, limit, base, remedy, device))
    return findings


def _base_bytes(assembly: "Foundation") -> int:
    """What is held without a batch, on the rank that holds most; garbage and what the heap keeps are not counted."""
    release_memory()
    return _extreme(assembly.accelerator, used_bytes(assembly.accelerator.device), largest=True)


def check_ranks(assembly: "Foundation") -> Finding:
    """Micro-batches and seconds of audio of each rank in the first epoch, from a sample of its updates."""
    plan, cut = assembly.plan, assembly.cut
    count = plan.updates_per_epoch
    chosen = np.unique(np.linspace(0, count - 1, min(count, UPDATES_CUT)).astype(np.int64))
    order, size = plan.epoch_order(0), plan.utterances_per_update
    samples, padded, micro_steps = np.zeros(cut.num_processes), np.zeros(cut.num_processes), 0
    for update in chosen:
        positions = order[update * size : (update + 1) * size]
        rows, copies = plan.rows[positions], np.zeros(len(positions), np.int64)
        lengths = assembly.collate.lengths(rows, plan.num_samples[positions], 0, copies)
        cuts = cut_update(lengths, cut.num_processes, cut.max_utterances, cut.max_batch_samples)
        micro_steps += len(cuts)
        for of_rank in cuts:
            samples += [lengths[rows].sum(dtype=np.int64) for rows in of_rank]
            padded += [len(rows) * int(lengths[rows].max(initial=0)) for rows in of_rank]
    scale = count / len(chosen) / SAMPLE_RATE_HZ
    seconds = " / ".join(f"{of_rank:,.1f}" for of_rank in samples * scale)
    padding = 1 - samples.sum() / max(padded.sum(), 1)
    each = f"{cut.num_processes} ranks with {count} updates each" if cut.num_processes > 1 else f"{count} updates"
    return Finding(
        "ranks",
        f"{each} per epoch, {micro_steps / len(chosen):.1f} micro-batches per update and rank; {seconds} s of audio, "
        f"{padding:.1%} padding",
        facts={
            "updates_per_epoch": count,
            "micro_batches_per_update": micro_steps / len(chosen),
            "seconds_per_rank": (samples * scale).tolist(),
            "padding_fraction": padding,
        },
    )


def check_disk(folder: Path, needed_bytes: int) -> Finding:
    """Whether the place can be written to and hold the run's checkpoints."""
    if trouble := _trouble_with(folder):
        return Finding("disk", trouble, "refused", f"choose another --output_dir than {folder}")
    # What the run has written there already makes room for what replaces it.
    held = sum(
        path.stat().st_size
        for name in ("checkpoints", "model", AVERAGE_FOLDER)
        for path in (folder / name).rglob("*.*")
    )
    free = free_bytes(folder) + held
    own = f", {held / 1e9:.2f} GB of it held by this run" if held else ""
    result = f"{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free{own}"
    facts = {"needed_bytes": needed_bytes, "free_bytes": free}
    if free >= needed_bytes:
        return Finding("disk", result, facts=facts)
    remedy = "lower --save_total_limit or choose another --output_dir"
    return Finding("disk", f"{folder}: {result}", "refused", remedy, facts)


def disk_bytes(assembly: "Foundation") -> int:
    """What the run will hold on the disk at most.

    Checkpoints with the weights (of adapters and LoRA those that are trained), two moments per trained weight and,
    where asked for, its moving average, one more while it is written; the best model twice; the weights to average,
    with those that older checkpoints count on.
    """
    trained, frozen = parameter_counts(assembly.model)
    weights = (trained + frozen) * BYTES_PER_WEIGHT
    kept = trained * BYTES_PER_WEIGHT if assembly.keeps_trained_alone else weights
    per_weight = 2 + (assembly.ema is not None)
    checkpoints = assembly.config.save_total_limit + 1
    models = 2 + _averaged_models(assembly)
    return checkpoints * (kept + per_weight * trained * BYTES_PER_WEIGHT) + models * weights


def _averaged_models(assembly: "Foundation") -> int:
    """Files of weights in average/ at most: the best, those of the checkpoints that are kept, one being written.

    And model/ of the best single evaluation, which is kept there beside an average.
    """
    config = assembly.config
    if config.average_best is None:
        return 0
    # Each evaluation since the oldest checkpoint may have pushed out one that this one counts on.
    since = -(-config.save_total_limit * config.save_steps // config.eval_steps)
    evaluations = -(-assembly.total_steps // config.eval_steps)
    return min(config.average_best + since, config.average_best * (config.save_total_limit + 1), evaluations) + 2


def _check_disk_of_run(assembly: "Foundation") -> Finding:
    """By the first rank, which is the one that writes."""
    needed = disk_bytes(assembly)
    if not assembly.config.output_dir:
        result = f"{needed / 1e9:.2f} GB needed where the run will lie"
        return Finding("disk", result, facts={"needed_bytes": needed})
    finding = check_disk(Path(assembly.config.output_dir), needed)
    return gather_object([finding])[0] if assembly.accelerator.num_processes > 1 else finding


def print_report(report: Report) -> None:
    """One screen on stdout: check, result, verdict, remedy."""
    print("\n".join(report.utterances), flush=True)
    table = Table("check", "result", "verdict", "remedy", box=box.SIMPLE_HEAD, pad_edge=False)
    for finding in report.findings:
        verdict = Text(finding.verdict, VERDICT_STYLES[finding.verdict])
        table.add_row(Text(finding.check), Text(finding.result), verdict, Text(finding.remedy))
    print_table(table)


def write_report(folder: Path, report: Report, assembly: "Foundation") -> None:
    """`preflight.json`, `drop_list.csv` and `suspects.csv` into a folder that exists."""
    facts = {
        "verdict": worst_verdict(report.findings),
        "max_batch_seconds": report.max_batch_seconds,
        "left_out": dict(assembly.selection.drops_by_reason),
        "findings": [asdict(finding) for finding in report.findings],
    }
    write_atomically(folder / "preflight.json", json.dumps(facts, indent=1, ensure_ascii=False))
    write_drop_list(folder / "drop_list.csv", assembly.train_set, assembly.selection)
    if "suspect_rate" in assembly.selection.details:  # Without texts nobody's rate is known.
        write_suspects(folder / "suspects.csv", assembly.train_set, assembly.selection)


def _training_shapes(assembly: "Foundation", cut: CutSettings) -> list[Shape]:
    return heaviest_shapes(assembly.training_lengths, assembly.plan.utterances_per_update, cut)


def _evaluation_shapes(assembly: "Foundation", cut: CutSettings) -> list[Shape]:
    """Of the dev rows that are scored, and of the test set, cut as one update of a single rank each."""
    scored = [assembly.eval_set.num_samples[assembly.eval_rows]]
    if assembly.test_set is not None:
        scored.append(assembly.test_set.num_samples)
    alone = CutSettings(0, 1, cut.max_utterances, cut.max_batch_seconds)
    return list(dict.fromkeys(shape for lengths in scored for shape in heaviest_shapes(lengths, len(lengths), alone)))


def _probe_everywhere(assembly: "Foundation", shape: Shape, is_training: bool, limit: float) -> Probe:
    """One shape on every rank at once: the largest peak, and whether it fits on all.

    Raises:
        RunFailed: memory ran out in a pass of a divided model, which the other processes cannot do without this one.
    """
    with failing_by_name(DIVIDED_REMEDY) if assembly.is_sharded else contextlib.nullcontext():
        mine = probe(assembly.passes, shape, is_training, limit)
    peak = _extreme(assembly.accelerator, mine.peak_bytes, largest=True)
    return Probe(shape, int(peak), assembly.status.worst(int(not mine.fits)) == [0])


def _set_budget(assembly: "Foundation", limit: float, base: float) -> tuple[Finding, dict[bool, list[Probe]]]:
    """Search the budget and use it; what was measured under it is judged as it is, not measured a second time."""
    seconds, measured = _find_budget(assembly, limit, base, is_evaluated=True)
    if seconds is None:
        is_training = _find_budget(assembly, limit, base, is_evaluated=False)[0] is None
        remedy = _single_clip_remedy(assembly, is_training)
        return Finding("batch seconds", "auto: not even the longest clip fits", "refused", remedy), {}
    assembly.use_budget(seconds)
    result = f"auto found {seconds:g} s: --max_batch_seconds {seconds:g} does the same without the search"
    return Finding("batch seconds", result, facts={"max_batch_seconds": seconds}), measured


def _find_budget(
    assembly: "Foundation", limit: float, base: float, is_evaluated: bool
) -> tuple[float | None, dict[bool, list[Probe]]]:
    """The largest --max_batch_seconds that leaves MARGIN of the memory free, the same on every rank.

    With it the batches that were run under it, by whether they are of the training.
    """
    lengths = assembly.training_lengths
    usable = usable_bytes(limit, base)
    measured: dict[bool, list[Probe]] = {}

    def fits(seconds: float) -> tuple[bool, float]:
        jobs = [(shape, True) for shape in _training_shapes(assembly, under_budget(assembly.cut, seconds))]
        if is_evaluated:
            jobs += [(shape, False) for shape in _evaluation_shapes(assembly, under_budget(assembly.eval_cut, seconds))]
        probes: dict[bool, list[Probe]] = {True: [], False: []}
        peak = 0
        for shape, is_training in jobs:
            found = _probe_everywhere(assembly, shape, is_training, usable)
            probes[is_training].append(found)
            peak = max(peak, found.peak_bytes)
            if not found.fits:
                return False, peak
        measured.update(probes)  # Each budget that fits is larger than the last: what stays belongs to the largest.
        if assembly.is_main:
            print(f"max_batch_seconds {seconds:.1f} fits: peak {peak / 1e6:,.0f} MB", file=sys.stderr, flush=True)
        return True, peak

    longest_clip = int(lengths.max()) / SAMPLE_RATE_HZ
    rows_per_rank = -(-min(assembly.plan.utterances_per_update, len(lengths)) // assembly.accelerator.num_processes)
    return search_max_batch_seconds(fits, longest_clip, rows_per_rank * longest_clip, base, usable), measured


def _memory_remedy(assembly: "Foundation", limit: float, is_training: bool, fits: bool) -> str:
    """What would fit, measured; searched for only where something does not."""
    if fits:
        return "--max_batch_seconds auto finds a size that leaves more room"
    if assembly.is_sharded:  # No search: a process that runs out of memory leaves the others in the midst of a pass.
        return "lower --per_device_train_batch_size or --per_device_eval_batch_size, or launch more processes"
    seconds, _ = _find_budget(assembly, limit, _base_bytes(assembly), is_evaluated=not is_training)
    if seconds is None:
        return _single_clip_remedy(assembly, is_training)
    return f"with --max_batch_seconds {seconds:g} it fits, and no update changes"


def _single_clip_remedy(assembly: "Foundation", is_training: bool) -> str:
    if is_training:
        longest = int(assembly.training_lengths.max()) / SAMPLE_RATE_HZ
        checkpointing = "" if assembly.config.gradient_checkpointing else "--gradient_checkpointing, "
        return f"one clip of {longest:.1f} s is too much: {checkpointing}a lower --max_duration_in_seconds, more memory"
    sets = [assembly.eval_set] + ([assembly.test_set] if assembly.test_set is not None else [])
    dataset = max(sets, key=lambda one: int(one.num_samples.max()))
    row = int(dataset.num_samples.argmax())
    seconds = dataset.num_samples[row] / SAMPLE_RATE_HZ
    return f"{dataset[row].id} of {dataset.folder.name} has {seconds:.1f} s: cut it into segments, or use more memory"


def _extreme(accelerator: Accelerator, value: float, largest: bool) -> float:
    """The largest or smallest value of all ranks."""
    if accelerator.num_processes == 1:
        return value
    return (max if largest else min)(gather_object([value]))


if __name__ == "__main__":
    sys.exit(exit_status(main))
