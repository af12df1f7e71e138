"""One process at a time in a folder. Nothing here imports torch."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from errors import UsageError

LOCK_FILE = ".prepare.lock"


@contextlib.contextmanager
def only_process_in(folder: Path, is_waiting: bool) -> Iterator[None]:
    """Hold `folder`, made where it is missing, for this process; the kernel gives it back however the process ends.

    A folder that is empty at the end is removed again.

    Args:
        folder: to hold.
        is_waiting: wait for another holder instead of being refused.

    Raises:
        UsageError: another process holds the folder (it is named), or the folder cannot be written.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / LOCK_FILE
    lock = _take(folder, path, is_waiting)
    try:
        yield
    finally:
        # Before the lock is given back: whoever waits for it sees that this file is no longer the folder's.
        with contextlib.suppress(OSError):
            path.unlink()
            for place in missing:
                place.rmdir()
        os.close(lock)


def _take(folder: Path, path: Path, is_waiting: bool) -> int:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"--data_dir {folder} cannot be written: {error.strerror}: name another folder") from error
        try:
            _wait_or_refuse(lock, folder, is_waiting)
            if _is_same_file(lock, path):
                # Says who holds it, and no more: on a full disk it stays empty.
                with contextlib.suppress(OSError):
                    os.ftruncate(lock, 0)
                    os.write(lock, f"{os.getpid()} on {socket.gethostname()}".encode())
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder has removed the file meanwhile


def _wait_or_refuse(lock: int, folder: Path, is_waiting: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 1000, 0).decode(errors="replace") or "unknown"
        if not is_waiting:
            raise UsageError(
                f"another prepare.py (process {holder}) is writing to {folder}: wait for it, or name another folder"
            ) from None
        print(f"waiting for another prepare.py (process {holder}) that writes to {folder}", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        print(f"note: {folder} is on a file system without locks: run one prepare.py at a time", flush=True)


def _is_same_file(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
