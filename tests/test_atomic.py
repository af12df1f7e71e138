"""Files and folders that are whole or absent, after a kill and on a full disk."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atomic import (
    check_free_space,
    format_bytes,
    free_bytes,
    nearest_existing,
    recover_folder,
    replace_folder,
    write_atomically,
)
from errors import RunFailed

REPOSITORY = Path(__file__).parent.parent


class Killed(BaseException):
    """Ends a call where a kill would."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_atomic_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old ọ")

    def write_half(file) -> None:
        file.write(b"ne")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(path, write_half)
    assert path.read_text(encoding="utf-8") == "old ọ"
    assert names(tmp_path) == ["file.json"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(RunFailed, match=r"missing.*cannot be written: No such file"):
        write_atomically(tmp_path / "missing" / "file", b"")


def test_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_atomically(small_disk / "plot.png", b"old")
    with pytest.raises(RunFailed, match=r"disk full at .*plot.png: 22.0 MB needed, 2\d\.\d MB free"):
        write_atomically(small_disk / "plot.png", bytes(22_000_000))
    assert names(small_disk) == ["plot.png"]
    assert (small_disk / "plot.png").read_bytes() == b"old"


@pytest.mark.parametrize("renames_before_the_kill", [0, 1, 2])
def test_interrupted_swap_of_a_folder_is_mended(tmp_path: Path, monkeypatch, renames_before_the_kill: int) -> None:
    new, target = tmp_path / "new", tmp_path / "model"
    for folder in (new, target):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    calls, rename = [], Path.rename

    def rename_until_killed(self: Path, other: Path) -> Path:
        if len(calls) == renames_before_the_kill:
            raise Killed
        calls.append(other)
        return rename(self, other)

    def remove_never(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename_until_killed)
        patch.setattr(shutil, "rmtree", remove_never)
        replace_folder(new, target)
    recover_folder(target)
    assert (target / "file").read_text() == ("new" if renames_before_the_kill == 2 else "model")
    assert "model.aside" not in names(tmp_path)
    if new.exists():
        replace_folder(new, target)
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_room_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def disk_usage(place: Path):
        asked.append(place)
        return shutil._ntuple_diskusage(10**9, 10**9 - 20_000_000, 20_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert free_bytes(tmp_path / "not" / "there" / "yet") == free_bytes(tmp_path) == 20_000_000
    assert asked == [tmp_path, tmp_path]
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(Path("runs/new")) == tmp_path
    check_free_space(tmp_path, 3_000_000)
    with pytest.raises(RunFailed, match=r"disk full at .*: 20\.8 MB needed, 20\.0 MB free; make room"):
        check_free_space(tmp_path, 4_000_000)  # with 16 MiB in reserve


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_250_000, "1.2 MB"), (3.2e12, "3200.0 GB")],
)
def test_bytes_as_text(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize("module", ["atomic", "shards", "integrity", "prepare"])
def test_no_torch(module: str) -> None:
    """prepare.py starts in a second, and its main process stays small."""
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
