"""What a run leaves behind to be read: the log, evaluation samples, the plot, the facts of the machine."""

import csv
import importlib.metadata
import io
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomic import reporting_disk_errors, write_atomically
from errors import UsageError
from levers import METRICS

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_COLUMNS = {
    "step": "optimizer steps done",
    "epoch": "passes over the training utterances, a fraction inside an epoch",
    "train_loss": "CTC loss per label (nats), mean since the last row; without what smoothing and consistency add",
    "eval_loss": "CTC loss per label (nats) of the dev set",
    "eval_wer": "word error rate of the dev set, a fraction, on normalised texts",
    "eval_wer_low": "its lower limit, with 95 % confidence; see intervals.py",
    "eval_wer_high": "its upper limit",
    "eval_cer": "character error rate of the dev set, a fraction",
    "eval_cer_low": "its lower limit",
    "eval_cer_high": "its upper limit",
    "eval_raw_wer": "word error rate against the texts as found",
    "eval_sentence_error_rate": "share of dev utterances with a word error",
    "eval_near_ties": "dev frames whose label may turn with the batch size",
    "eval_insertion_rate": "words inserted, per word of the dev references",
    "eval_deletion_rate": "words lost, per word of the dev references",
    "eval_substitution_rate": "words replaced, per word of the dev references",
    "eval_word_count_ratio": "words of the hypotheses per word of the dev references",
    "eval_label_length_ratio": "labels of the hypotheses per label of the dev references",
    "eval_empty_fraction": "share of dev utterances with an empty hypothesis",
    "eval_distinct_hypotheses": "different hypotheses of the dev set, up to 1000",
    "eval_mean_top_probability": "of the best label, mean over dev frames",
    "eval_top_probability_deviation": "its standard deviation over dev frames; near 0 where the model says one thing",
    "eval_unknown_reference_fraction": "share of the dev references' labels that the vocabulary lacks",
    "eval_unknown_hypothesis_fraction": "share of unknown tokens among the labels of the hypotheses",
    "eval_unfit_input_fraction": "share of dev waveforms that reach the model silent, unscaled or with a large offset",
    **{f"ema_{name}": f"{name} of the weights' moving average (--ema_decay)" for name in METRICS},
    "eval_deaf_loss": "the best eval_loss that a model can reach without listening; see diagnosis.py",
    "state": "what a run is in whose WER is 0.99 or more; see diagnosis.py",
    "learning_rate": "of the last step",
    "grad_norm": "before clipping, of the last step",
    "samples_per_second": "training utterances per second since the last row",
    "audio_seconds_per_second": "training audio per second since the last row, without padding",
    "padding_fraction": "share of padding in what was trained on since the last row",
    "blank_fraction": "share of dev frames decoded as blank",
    "scaler_skips": "updates skipped by the fp16 loss scaler since the start",
    "bad_updates": "updates left out for a gradient that is not finite, since the start",
    "oom_retries": "times that memory ran out and the work was done again in smaller cuts, since the start",
    "eval_runtime": "seconds of the evaluation",
    "peak_memory_mb": "of the GPU where there is one, else of the process",
    "data_seconds": "waiting for data since the last row, as the first process sees it, like the next four",
    "compute_seconds": "in updates",
    "communication_seconds": "waiting for other processes in updates",
    "evaluation_seconds": "evaluating; ends with this row, so what comes behind it counts for the next one",
    "save_seconds": "writing checkpoints and model/",
    "elapsed_seconds": "of training since the start, resumes included",
}
PRETRAINING_COLUMNS = {
    **{name: LOG_COLUMNS[name] for name in ("step", "epoch")},
    "train_loss": "contrastive loss + weight x diversity loss per masked frame (nats), mean since the last row",
    "contrastive_loss": "per masked frame (nats), mean since the last row",
    "diversity_loss": "share of the codes that is not in use, by the perplexity",
    "code_perplexity": "codes in use: exp of the entropy of an update's codes, summed over groups; mean over updates",
    "accuracy": "share of masked frames told apart from all their distractors",
    "gumbel_temperature": "of the choice of codes, at the last step",
    "eval_loss": "train_loss of the dev set, with masks that are always the same and without noise",
    "eval_contrastive_loss": "contrastive_loss of the dev set",
    "eval_diversity_loss": "diversity_loss of the dev set",
    "eval_code_perplexity": "code_perplexity of the codes that the dev set was given",
    "eval_accuracy": "accuracy of the dev set",
    **{
        name: LOG_COLUMNS[name]
        for name in (
            *("learning_rate", "grad_norm", "samples_per_second", "audio_seconds_per_second", "padding_fraction"),
            *("scaler_skips", "bad_updates", "oom_retries", "eval_runtime", "peak_memory_mb", "data_seconds"),
            *("compute_seconds", "communication_seconds", "evaluation_seconds", "save_seconds", "elapsed_seconds"),
        )
    },
}
SLICE_COLUMNS = ("step", "slice", "group", "utterances", "wer", "wer_low", "wer_high", "cer", "unit", "is_small")
SAMPLE_COLUMNS = ("step", "id", "reference", "prediction")
# `step` as in the log, which the update would have brought about; `loss` is the sum over the clip's labels.
BAD_BATCH_COLUMNS = ("step", "id", "seconds", "labels", "loss")
# What report.py makes of it all.
REPORT_FILE = "report.html"
PACKAGES = (
    "torch", "torchaudio", "transformers", "accelerate", "huggingface_hub", "safetensors", "tokenizers", "soundfile",
    "jiwer", "numpy", "pandas", "pyarrow", "peft",
)  # fmt: skip
SECONDS_FOR_A_TOOL = 10


class AppendOnlyTable:
    """A CSV file that grows by whole lines, each on disk before `append` returns, and can be read at any time.

    Opening an existing file goes on with it; a last line that a kill tore is cut. `length_bytes` goes into the
    checkpoint and `truncate` cuts the file back to it on resume, so that no row is lost or doubled.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        header = self._format([dict(zip(self.columns, self.columns, strict=True))])
        if not path.exists() or path.stat().st_size == 0:
            write_atomically(path, header)
        elif path.open("rb").readline() != header:
            raise UsageError(f"{path} has other columns than this version writes; continue in a new --output_dir")
        self.truncate(len(_whole_lines(path.read_bytes())))

    @property
    def length_bytes(self) -> int:
        """Size of the file; everything up to it is on disk."""
        return self.path.stat().st_size

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows; a column that a row lacks, or holds as None, stays empty.

        Raises:
            RunFailed: disk full or not writable; none of the rows is in the file.
        """
        data, length = self._format(rows), self.length_bytes
        with reporting_disk_errors(self.path, len(data)), self.path.open("ab", buffering=0) as file:
            try:
                written = file.write(data)
                if written != len(data):  # a nearly full disk takes the first part without an error
                    file.write(data[written:])
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(self.path, length)
                raise

    def truncate(self, length_bytes: int) -> None:
        """Cut the file back to a length that a checkpoint stored.

        Raises:
            UsageError: the file is shorter, so rows that the checkpoint counts on are gone.
        """
        if self.length_bytes < length_bytes:
            raise UsageError(
                f"{self.path} has {self.length_bytes} bytes and the checkpoint counts on {length_bytes}: rows were "
                "removed; put the file back or start over in a new --output_dir"
            )
        if self.length_bytes > length_bytes:
            os.truncate(self.path, length_bytes)

    def _format(self, rows: Iterable[Mapping[str, Any]]) -> bytes:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        for row in rows:
            assert set(row) <= set(self.columns), f"unknown columns {set(row) - set(self.columns)}"
            writer.writerow([_format_value(row.get(column)) for column in self.columns])
        return buffer.getvalue().encode()


class TrainingLog(AppendOnlyTable):
    """training_log.csv: one row per logging or evaluation step."""

    def __init__(self, path: Path, columns: Iterable[str] = tuple(LOG_COLUMNS)) -> None:
        super().__init__(path, columns)


class SampleTable(AppendOnlyTable):
    """eval_samples.csv: references and predictions of the same few utterances at every evaluation."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SAMPLE_COLUMNS)


class SliceTable(AppendOnlyTable):
    """eval_slices.csv: the error rates of each group of dev utterances at every evaluation."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SLICE_COLUMNS)


class BadBatchTable(AppendOnlyTable):
    """bad_batches.csv: the clips of each update that was left out because loss or gradient was not finite."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, BAD_BATCH_COLUMNS)


def read_log(path: Path) -> "pandas.DataFrame":
    """The whole rows of a log, also while a run appends to it; empty fields are NaN."""
    import pandas

    return pandas.read_csv(io.BytesIO(_whole_lines(path.read_bytes())))


def report_line(folder: Path) -> str:
    """For the end of a screen: the command that shows what a folder holds."""
    return f"report: {shlex.join(['python', 'report.py', str(folder)])}"


def draw_training_curve(log: "pandas.DataFrame", path: Path, title: str = "") -> None:
    """Draw loss, error rates, learning rate and gradient norm over steps as a PNG, written atomically.

    Args:
        log: from `read_log`; values that are missing or not finite are left out.
        path: of the PNG.
        title: the run's name.
    """
    figure, (loss, errors, *rest) = _begin_figure(title, 2)
    _draw_losses(loss, log, "CTC loss per label")
    _draw_line(errors, log, "eval_wer", "tab:red", "WER", marker="o", scale=100)
    _draw_line(errors, log, "eval_cer", "tab:purple", "CER", marker="s", scale=100)
    _draw_line(errors, log, "ema_eval_wer", "tab:olive", "WER of the moving average", marker=".", scale=100)
    errors.set_title("Error rate on dev (%)" + _mark_best(errors, log))
    _finish_figure(figure, log, [loss, errors], rest, path)


def draw_pretraining_curve(log: "pandas.DataFrame", path: Path, num_codes: int, title: str = "") -> None:
    """The same of a run of pretrain.py: loss, accuracy of the masked frames and codes in use, of `num_codes`."""
    figure, (loss, accuracy, codes, contrastive, *rest) = _begin_figure(title, 3)
    _draw_losses(loss, log, "Loss per masked frame")
    for panel, name, scale in ((accuracy, "accuracy", 100), (codes, "code_perplexity", 1)):
        _draw_line(panel, log, name, "tab:blue", "training", light=True, scale=scale)
        _draw_line(panel, log, f"eval_{name}", "tab:orange", "dev", marker="o", scale=scale)
    accuracy.set_title("Masked frames told apart (%)")
    codes.set_title(f"Codes in use (perplexity, of {num_codes})")
    _draw_line(contrastive, log, "contrastive_loss", "tab:blue", "training", light=True)
    _draw_line(contrastive, log, "eval_contrastive_loss", "tab:orange", "dev", marker="o")
    contrastive.set_title("Contrastive loss")
    _finish_figure(figure, log, [loss, accuracy, codes, contrastive], rest, path)


def _begin_figure(title: str, rows: int) -> "tuple[Figure, list[Axes]]":
    # Imported late (a second), and without pyplot: a bare Figure draws PNGs with Agg and needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5 * rows), dpi=120, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13)
    return figure, list(figure.subplots(rows, 2, sharex=True).flat)


def _draw_losses(panel: "Axes", log: "pandas.DataFrame", title: str) -> None:
    _draw_line(panel, log, "train_loss", "tab:blue", "training", light=True)
    _draw_line(panel, log, "eval_loss", "tab:orange", "dev", marker="o")
    panel.set_title(title)


def _finish_figure(
    figure: "Figure", log: "pandas.DataFrame", panels: "list[Axes]", last: "list[Axes]", path: Path
) -> None:
    """Learning rate and gradient norm into the last row, then the file."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    learning_rate, grad_norm = last
    _draw_line(learning_rate, log, "learning_rate", "tab:green")
    learning_rate.set_title("Learning rate")
    learning_rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    _draw_line(grad_norm, log, "grad_norm", "tab:gray", light=True)
    grad_norm.set_title("Gradient norm before clipping")
    for panel in (*panels, *last):
        _finish_panel(panel, starts_at_zero=panel is not grad_norm)
    if (log["grad_norm"] > 0).any() and grad_norm.lines:
        grad_norm.set_yscale("log")
        grad_norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        grad_norm.yaxis.set_major_formatter("{x:g}")
        grad_norm.yaxis.set_minor_locator(NullLocator())
    for panel in last:
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def describe_environment(project: Path, data_fingerprint: str, launcher: Mapping[str, Any]) -> dict[str, Any]:
    """The facts for environment.json: what `transformers env` and `nvidia-smi` say, and the project's revision.

    Never fails: what cannot be found out is None.

    Args:
        project: folder of the program's sources.
        data_fingerprint: of the prepared data.
        launcher: processes, precision and backend that are really used.
    """
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    status = _run(["git", "-C", str(project), "status", "--porcelain"])
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "gpus": [{"name": gpu.name, "memory_mb": gpu.total_memory // 2**20} for gpu in gpus],
        "nvidia_smi": _run(["nvidia-smi"]),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_revision": _run(["git", "-C", str(project), "rev-parse", "HEAD"]),
        "git_dirty": None if status is None else bool(status),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "data_fingerprint": data_fingerprint,
        "launcher": dict(launcher),
    }


def _whole_lines(data: bytes) -> bytes:
    # No field holds a line break, so the last one ends the last whole row.
    return data[: data.rfind(b"\n") + 1]


def _format_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"  # nine digits hold every float32 exactly
    return " ".join(str(value).splitlines())


def _draw_line(
    panel: "Axes",
    log: "pandas.DataFrame",
    column: str,
    color: str,
    label: str | None = None,
    marker: str | None = None,
    scale: float = 1.0,
    light: bool = False,
) -> None:
    """One curve through the finite values; `light` draws noisy ones pale with their running mean on top."""
    values = log[["step", column]].astype(float)
    values = values[values[column].map(math.isfinite)]
    if values.empty:
        return
    steps, heights = values["step"], values[column] * scale
    if len(values) == 1:
        marker = "o"
    if light and len(values) > 40:
        panel.plot(steps, heights, color=color, alpha=0.25, linewidth=0.8)
        heights = heights.ewm(span=max(len(values) // 25, 5)).mean()
        label = label and f"{label} (smoothed)"
    size = 4 if len(values) <= 60 else 0
    panel.plot(steps, heights, color=color, label=label, marker=marker, markersize=size, linewidth=1.6)


def _mark_best(panel: "Axes", log: "pandas.DataFrame") -> str:
    """A star at the lowest WER; returns its words for the title, where they hide no curve."""
    wer = log["eval_wer"].astype(float).dropna()
    if wer.empty:
        return ""
    row = wer.idxmin()
    step, best = log["step"][row], 100 * wer[row]
    panel.plot([step], [best], "*", color="tab:red", markersize=14, markeredgecolor="white", zorder=5)
    return f", best WER {best:.2f} at step {step:,.0f}"


def _finish_panel(panel: "Axes", starts_at_zero: bool) -> None:
    panel.grid(True, color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelbottom=True, labelsize=9)
    if not panel.lines:
        panel.set_yticks([])
        panel.text(0.5, 0.5, "no value yet", transform=panel.transAxes, ha="center", va="center", color="0.6")
        return
    if starts_at_zero:
        panel.set_ylim(bottom=0)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=9)


def _run(command: list[str]) -> str | None:
    """Standard output of a tool, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_A_TOOL)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
