"""One process at a time in a folder: refused by name, given back by a kill, waited for where hosts share it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UsageError
from lock import LOCK_FILE, only_process_in

REPOSITORY = Path(__file__).parent.parent
# Holds the folder of its argument, says so, and lets go when its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from lock import only_process_in
with only_process_in(Path(sys.argv[1]), sys.argv[2] == "wait"):
    print("held", flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


def start_holder(folder: Path, mode: str = "refuse") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_second_is_refused_and_told_folder_and_process(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    holder = start_holder(folder)
    assert holder.stdout.readline() == "held\n"
    message = rf"another prepare\.py \(process {holder.pid} on .+\) is writing to {folder}: wait for it"
    with pytest.raises(UsageError, match=message), only_process_in(folder, is_waiting=False):
        pass
    assert holder.communicate("")[0] == "released\n"
    assert names(tmp_path) == [], "what was made for the lock alone is gone"
    with only_process_in(folder, is_waiting=False):
        (folder / "kept").touch()
    assert names(folder) == ["kept"]


def test_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert names(tmp_path) == [LOCK_FILE], "the file stays, the lock does not"
    with only_process_in(tmp_path, is_waiting=False):
        pass
    assert names(tmp_path) == []


def test_waiting_processes_take_turns_and_all_get_theirs(tmp_path: Path) -> None:
    """The file is removed by each holder in turn, and nobody is left with a lock on a removed one."""
    folder = tmp_path / "shared"
    with only_process_in(folder, is_waiting=True):
        waiting = [start_holder(folder, "wait") for _ in range(3)]
        for process in waiting:
            assert process.stdout.readline().startswith(f"waiting for another prepare.py (process {os.getpid()} on ")
    for process in waiting:
        # Whoever comes next holds the folder until its stdin ends; the others still wait.
        process.stdin.close()
    for process in waiting:
        lines = process.stdout.read().splitlines()
        assert [line for line in lines if not line.startswith("waiting")] == ["held", "released"]
        assert process.wait() == 0
    assert names(folder) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = rf"--data_dir {tmp_path}/file/data cannot be written: Not a directory: name another folder"
    with pytest.raises(UsageError, match=message), only_process_in(tmp_path / "file" / "data", is_waiting=False):
        pass
