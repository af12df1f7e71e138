"""Exit statuses, and which process of a run says why it ended."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from errors import RunFailed, UsageError, exit_status

REPOSITORY = Path(__file__).parent.parent


def end_with(error: BaseException | None) -> int:
    def command() -> None:
        if error is not None:
            raise error

    return exit_status(command)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (RunFailed("the disk is full"), 1, "failed: the disk is full\n"),
        (UsageError("--seed is -1"), 2, "error: --seed is -1\n"),
        (UsageError("a\nb.wav\u2028.mp3 is missing"), 2, "error: a b.wav .mp3 is missing\n"),
        (RunFailed("a\r\nb.wav is missing"), 1, "failed: a b.wav is missing\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_status_and_one_line(
    error: BaseException | None, status: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error) == status
    assert capfd.readouterr() == ("", line)


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("ours"), RuntimeError("ours"), OSError("ours")])
def test_our_own_mistakes_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        end_with(error)


def test_both_errors_are_the_builtins_that_callers_expect() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(RunFailed, RuntimeError)


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "status", "line"),
    [
        ("0", "0", UsageError("no"), 2, "error: no\n"),
        ("1", "1", UsageError("no"), 2, ""),
        # The first process of the second machine: its screen is another one.
        ("4", "0", UsageError("no"), 2, "error: no\n"),
        ("0", "0", RunFailed("full"), 1, "failed: full\n"),
        ("1", "1", RunFailed("full"), 1, "[rank 1] failed: full\n"),
        ("4", "0", RunFailed("full"), 1, "[rank 4] failed: full\n"),
        ("3", "3", KeyboardInterrupt(), 130, ""),
    ],
)
def test_one_process_refuses_for_all_and_each_says_its_own_failure(
    rank: str,
    local_rank: str,
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert end_with(error) == status
    assert capfd.readouterr().err == line


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_end_a_command_without_a_traceback(number: signal.Signals, status: int) -> None:
    """A process that SIGTERM ended shows as 143 in a shell."""
    program = (
        # A shell lets what it runs in the background ignore Ctrl-C, the tests included.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from errors import exit_status\n"
        "def command():\n"
        "    print('ready', flush=True)\n"
        "    signal.pause()\n"
        "sys.exit(exit_status(command))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, complaint = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in complaint


@pytest.mark.parametrize(
    ("line", "status", "complaint"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "interrupted\n"),
        ("raise ZeroDivisionError('ours')", 1, "ZeroDivisionError: ours\n"),
    ],
)
def test_interrupt_while_a_command_imports(line: str, status: int, complaint: str) -> None:
    """A process that SIGINT ended shows as 130 in a shell."""
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored by what runs in the background
    program = f"import errors; import os, signal; {heard}; {line}"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines(keepends=True)[-1] == complaint
    assert ("Traceback" in done.stderr) == (status == 1)


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_commands_import_errors_first(command: str) -> None:
    body = ast.parse((REPOSITORY / command).read_text(encoding="utf-8")).body
    first = next(statement for statement in body if isinstance(statement, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "errors"
