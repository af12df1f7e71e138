"""The log while it grows, after a kill and after a resume; the plot with little and with odd data."""

import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from conftest import fill

import runlog
from errors import RunFailed, UsageError
from runlog import LOG_COLUMNS, SampleTable, TrainingLog, describe_environment, draw_training_curve, read_log

CONTRACT = (
    "step", "epoch", "train_loss", "eval_loss", "eval_wer", "eval_cer", "learning_rate", "grad_norm",
    "samples_per_second", "audio_seconds_per_second", "padding_fraction", "blank_fraction", "eval_runtime",
    "peak_memory_mb", "elapsed_seconds",
)  # fmt: skip


def test_columns_hold_the_contract() -> None:
    assert set(CONTRACT) <= set(LOG_COLUMNS)
    assert list(LOG_COLUMNS)[:2] == ["step", "epoch"]


def test_rows_come_back_and_are_readable_at_any_time(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "training_log.csv")
    assert list(read_log(log.path).columns) == list(LOG_COLUMNS)
    assert len(read_log(log.path)) == 0
    float32 = struct.unpack("f", struct.pack("f", 0.1))[0]
    log.append({"step": 50, "train_loss": float32, "learning_rate": 4.9998e-5, "eval_wer": None})
    assert len(read_log(log.path)) == 1
    log.append({"step": 100, "train_loss": math.nan, "grad_norm": math.inf}, {"step": 150, "epoch": 0.5})
    rows = read_log(log.path)
    assert rows["step"].tolist() == [50, 100, 150]
    assert struct.pack("f", rows["train_loss"][0]) == struct.pack("f", float32)
    assert rows["learning_rate"][0] == 4.9998e-5
    assert math.isinf(rows["grad_norm"][1])
    assert "100,,nan," in log.path.read_text()
    with pytest.raises(AssertionError, match="loss_train"):
        log.append({"step": 1, "loss_train": 0.0})


def test_torn_last_line_is_not_read_and_is_cut_on_opening(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.csv")
    log.append({"step": 50, "train_loss": 1.5})
    whole = log.path.read_bytes()
    for torn in (b"1", b"100,0.25,1.2", b"100" + b"," * (len(LOG_COLUMNS) - 1)):
        log.path.write_bytes(whole + torn)
        assert read_log(log.path)["step"].tolist() == [50]
        TrainingLog(log.path).append({"step": 100})
        assert read_log(log.path)["step"].tolist() == [50, 100]


def test_resume_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.csv")
    log.append({"step": 50})
    length = log.length_bytes
    expected = log.path.read_bytes()
    log.append({"step": 100}, {"step": 150})
    resumed = TrainingLog(log.path)
    resumed.truncate(length)
    assert log.path.read_bytes() == expected
    resumed.append({"step": 100})
    assert read_log(log.path)["step"].tolist() == [50, 100]
    with pytest.raises(UsageError, match="rows were removed"):
        resumed.truncate(10_000)
    assert read_log(log.path)["step"].tolist() == [50, 100]


def test_log_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UsageError, match="other columns"):
        TrainingLog(tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,2\n"


def test_failed_append_leaves_whole_rows(tmp_path: Path, monkeypatch) -> None:
    log = TrainingLog(tmp_path / "log.csv")
    log.append({"step": 50})
    before = log.path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog.os, "fsync", full_disk)
    with pytest.raises(RunFailed, match=r"disk full at .*log\.csv"):
        log.append({"step": 100})
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("kind", [TrainingLog, SampleTable])
def test_a_full_disk_leaves_the_rows_that_were_written(small_disk: Path, kind) -> None:
    table = kind(small_disk / "table.csv")
    row = dict.fromkeys(table.columns, "0.123456789") | {"step": 1}
    filler = fill(small_disk, 8_192)
    written = 0
    # The last page of the file takes a part of the row without an error.
    with pytest.raises(
        RunFailed, match=r"disk full at .*table\.csv: \d+ bytes needed, 0 bytes free; make room and resume"
    ):
        for written in range(1_000):
            table.append(row | {"step": written})
    assert read_log(table.path)["step"].tolist() == list(range(written))
    filler.unlink()
    kind(table.path).append(row | {"step": written})
    assert read_log(table.path)["step"].tolist() == list(range(written + 1))


def test_a_full_disk_leaves_the_old_plot(small_disk: Path) -> None:
    log, path = TrainingLog(small_disk / "log.csv"), small_disk / "curve.png"
    log.append({"step": 1, "train_loss": 2.0})
    draw_training_curve(read_log(log.path), path)
    before = path.read_bytes()
    filler = fill(small_disk, 8_192)
    log.append({"step": 2, "train_loss": 1.0})
    with pytest.raises(
        RunFailed, match=r"disk full at .*curve\.png: \d+\.\d kB needed, 8\.2 kB free; make room and resume"
    ):
        draw_training_curve(read_log(log.path), path)
    assert path.read_bytes() == before
    filler.unlink()
    draw_training_curve(read_log(log.path), path)
    assert path.read_bytes() != before
    assert sorted(file.name for file in small_disk.iterdir()) == ["curve.png", "log.csv"]


def test_samples_with_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    samples = SampleTable(tmp_path / "eval_samples.csv")
    samples.append(
        {"step": 0, "id": "a,b", "reference": 'say "ọ́"', "prediction": ""},
        {"step": 0, "id": "c", "reference": "two\nlines\u2028here", "prediction": "<unk>"},
    )
    rows = pandas.read_csv(samples.path, keep_default_na=False)
    assert rows.values.tolist() == [[0, "a,b", 'say "ọ́"', ""], [0, "c", "two lines here", "<unk>"]]


LOGS = {
    "no row": [],
    "one row": [{"step": 50, "train_loss": 3.0, "learning_rate": 1e-5, "grad_norm": 4.0}],
    "row 0 only": [{"step": 0, "eval_wer": 0.5, "eval_cer": 0.2, "eval_loss": 1.0}],
    "no evaluation": [{"step": step, "train_loss": 1 / step, "grad_norm": 2.0} for step in range(1, 90)],
    "nothing finite": [{"step": 1, "train_loss": math.nan, "grad_norm": math.inf, "eval_wer": math.nan}],
    "zeros": [{"step": step, "train_loss": 0.0, "eval_wer": 0.0, "grad_norm": 0.0} for step in (1, 2)],
    "all": [
        {"step": step, "train_loss": 3 / step, "eval_loss": 4 / step, "eval_wer": 1 / step, "eval_cer": 0.5 / step,
         "learning_rate": 1e-4, "grad_norm": 9.0 if step % 5 else math.nan}
        for step in range(1, 100)
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LOGS)
def test_plot_of_any_log_is_a_whole_png(tmp_path: Path, name: str) -> None:
    log = TrainingLog(tmp_path / "log.csv")
    log.append(*LOGS[name])
    path = tmp_path / "training_curve.png"
    path.write_bytes(b"old")
    draw_training_curve(read_log(log.path), path, title="run")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1320, 840)
    assert data.endswith(b"IEND\xaeB`\x82")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.csv", "training_curve.png"]


def test_import_is_light() -> None:
    program = "import sys, runlog; print([m for m in ('matplotlib', 'pandas', 'transformers') if m in sys.modules])"
    project = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_is_json_and_never_fails(tmp_path: Path, monkeypatch) -> None:
    facts = describe_environment(Path(__file__).parent.parent, "fingerprint", {"num_processes": 2})
    assert json.loads(json.dumps(facts)) == facts
    assert facts["launcher"] == {"num_processes": 2}
    assert facts["data_fingerprint"] == "fingerprint"
    assert facts["packages"]["torch"]
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = describe_environment(tmp_path, "", {})
    assert (bare["git_revision"], bare["git_dirty"], bare["nvidia_smi"]) == (None, None, None)


def test_environment_reads_tools_and_survives_a_broken_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool = tmp_path / "nvidia-smi"
    for script, expected in (("echo Driver 999", "Driver 999"), ("echo broken; exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert describe_environment(tmp_path, "", {})["nvidia_smi"] == expected
    tool.write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(runlog, "SECONDS_FOR_A_TOOL", 0.2)
    assert describe_environment(tmp_path, "", {})["nvidia_smi"] is None


def test_read_log_takes_what_pandas_takes(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.csv")
    log.append({"step": 50, "eval_wer": 1 / 3})
    assert read_log(log.path).equals(pandas.read_csv(io.BytesIO(log.path.read_bytes())))
