"""How every command ends: one clear line and an exit status, never a traceback for what a user can cause."""

import os
import sys
import types
from collections.abc import Callable

STATUS_DONE = 0
STATUS_FAILED = 1
STATUS_REFUSED = 2
STATUS_INTERRUPTED = 130


class UsageError(ValueError):
    """Wrong use or refused input. The message says value, limit and remedy; the status is 2."""


class RunFailed(RuntimeError):
    """The run was right and failed on the way (disk full, non-finite loss). The status is 1."""


class Stopped(Exception):
    """The run was asked to stop, and has; another command goes on from there.

    Attributes:
        status: 130 after Ctrl-C, else 143.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def exit_status(command: Callable[[], None]) -> int:
    """Run `command` and turn the errors that a user can cause into one line on stderr and a status.

    Every process of a run refuses alike, so the first one of each machine says it for all; what fails on the way may
    be one rank's own trouble, and each says it, with its number.
    """
    try:
        command()
    except UsageError as error:
        if _is_first_of_machine():
            print(f"error: {in_one_line(error)}", file=sys.stderr)
        return STATUS_REFUSED
    except RunFailed as error:
        rank = os.environ.get("RANK", "0")
        print(f"{'' if rank == '0' else f'[rank {rank}] '}failed: {in_one_line(error)}", file=sys.stderr)
        return STATUS_FAILED
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {in_one_line(stopped)}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        _say_interrupted()
        return STATUS_INTERRUPTED
    return STATUS_DONE


def in_one_line(error: object) -> str:
    """The message quotes names of files, columns and utterances, which may hold line ends."""
    return " ".join(str(error).splitlines())


def _say_interrupted() -> None:
    if _is_first_of_machine():
        print("interrupted", file=sys.stderr)


def _is_first_of_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _say_interrupted()
    else:
        sys.__excepthook__(kind, error, trace)


# Commands import this module first: Ctrl-C during their other imports, which take seconds, is one line too. Python then
# ends by the signal, which a shell shows as 130.
sys.excepthook = _show_uncaught
