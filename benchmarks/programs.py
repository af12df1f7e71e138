"""The project's programs as benchmarks call them: one thread, output into a log, an end with its last line."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run_program(program: str, *arguments: object, log: Path) -> float:
    """A program of the repository to its end.

    Returns:
        Seconds of processor time that it and its children took.

    Raises:
        SystemExit: it failed; names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / program), *map(str, arguments)]
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{program} failed, see {log}: {(log.read_text().splitlines() or ['no output'])[-1]}")
    return usage.ru_utime + usage.ru_stime
