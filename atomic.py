"""Files and folders that are whole or absent, and room on the disk for them. Nothing here imports torch."""

import contextlib
import csv
import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from errors import RunFailed

# Left over by a process that was killed; the next save or swap clears them away.
UNFINISHED, ASIDE = ".unfinished", ".aside"
# What a save may need beyond its tensors: JSON, the log, the plot.
SPARE_BYTES = 16 * 2**20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(
    path: Path, content: bytes | str | Callable[[BinaryIO], None], num_bytes: int | None = None
) -> None:
    """Write a file so that `path` holds the old content or all of the new one, whatever happens.

    Args:
        path: its folder must exist.
        content: bytes, text (UTF-8) or a function that writes into the open binary file.
        num_bytes: what a function will write, about; said when the disk is full.

    Raises:
        RunFailed: disk full or not writable, naming path and space; `path` is as it was.
    """
    if isinstance(content, str):
        content = content.encode()
    num_bytes = num_bytes if callable(content) else len(content)
    with appearing(path, num_bytes) as unfinished, unfinished.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


@contextlib.contextmanager
def appearing(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Another name for the block to write a file under, which becomes `path` behind it, or nothing does.

    Args:
        path: of the file, which may hold an older one.
        num_bytes: what will be written, about; said when the disk is full.

    Raises:
        RunFailed: disk full or not writable, naming path and space; `path` is as it was.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with reporting_disk_errors(path, num_bytes):
        try:
            yield unfinished
            _sync_file(unfinished)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_table(
    path: Path, columns: Iterable[object], rows: Iterable[Iterable[object]], num_bytes: int | None = None
) -> None:
    """A CSV file, row by row, as `write_atomically` writes one."""

    def write(file: BinaryIO) -> None:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
        lines.detach()  # The file stays open for its owner.

    write_atomically(path, write, num_bytes)


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new`, made durable first, in the place of `target`, which may hold an older one.

    Renaming onto a folder that is not empty fails (trap 33), so the older one steps aside for a moment;
    `recover_folder(target)` mends a kill in that moment.
    """
    aside = target.with_name(target.name + ASIDE)
    with reporting_disk_errors(target):
        for path in [*new.rglob("*"), new]:
            sync_folder(path) if path.is_dir() else _sync_file(path)
        recover_folder(target)
        if target.exists():
            target.rename(aside)
        new.rename(target)
        sync_folder(target.parent)
        if aside.exists():
            shutil.rmtree(aside)


def recover_folder(target: Path) -> None:
    """Undo a `replace_folder` that was killed half-way: the older folder returns when no newer one is in place."""
    aside = target.with_name(target.name + ASIDE)
    if not aside.exists():
        return
    if target.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(target)
        sync_folder(target.parent)


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        RunFailed: less than `num_bytes` and a small reserve are free.
    """
    free = free_bytes(folder)
    if free < num_bytes + SPARE_BYTES:
        raise RunFailed(disk_full(folder, num_bytes + SPARE_BYTES, free))


def free_bytes(path: Path) -> int:
    """Room on the disk that `path` lies on, or will lie on once it is made."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """`path` where it exists, else the nearest parent that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


@contextlib.contextmanager
def reporting_disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn a failed write into `RunFailed` with the path, the space needed (where known) and the space free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports the operating system's errors as text only.
        number = getattr(error, "errno", None) or int((re.findall(r"os error (\d+)", str(error)) or [0])[0])
        if number in DISK_FULL:
            raise RunFailed(disk_full(path, num_bytes, free_bytes(path))) from error
        raise RunFailed(f"{path} cannot be written: {os.strerror(number) if number else error}") from error


def disk_full(path: Path, needed: int | None, free: int, remedy: str = "make room and resume") -> str:
    """The one line about it."""
    need = f"{format_bytes(needed)} needed, " if needed is not None else ""
    return f"disk full at {path}: {need}{format_bytes(free)} free; {remedy}"


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest decimal unit that leaves at least 1."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def sync_open_file(file: io.BufferedWriter) -> None:
    """Wait until what was written into `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
