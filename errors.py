"""How every command ends: one clear line and an exit status, never a traceback for what a user can cause."""

import sys
from collections.abc import Callable

STATUS_DONE = 0
STATUS_FAILED = 1
STATUS_REFUSED = 2


class UsageError(ValueError):
    """Wrong use or refused input. The message says value, limit and remedy; the status is 2."""


class RunFailed(RuntimeError):
    """The run was right and failed on the way (disk full, non-finite loss). The status is 1."""


def exit_status(command: Callable[[], None]) -> int:
    """Run `command` and turn the errors that a user can cause into one line on stderr and a status."""
    try:
        command()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return STATUS_REFUSED
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return STATUS_FAILED
    return STATUS_DONE
