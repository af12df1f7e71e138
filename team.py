"""The processes of a launcher that share the work of prepare.py; without a launcher, this process alone.

Torch is imported only where there are several.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hosts import check_hosts_agree, check_shared_folder

if TYPE_CHECKING:
    from config import PrepareConfig
    from processes import RankStatus

Value = TypeVar("Value")
# Whoever is ready first waits for the others, whose parts may be longer and whose disks slower. One that has ended is
# noticed by those who wait, so at the latest when their own parts are done, which are good.
SECONDS_TO_WAIT = 24 * 3600


@dataclass(frozen=True)
class Team:
    """This process among those that prepare one folder.

    Attributes:
        rank: of this process.
        size: how many there are.
        on_this_host: how many of them.
        status: what they talk over; None for one.
    """

    rank: int = 0
    size: int = 1
    on_this_host: int = 1
    status: "RankStatus | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks, and does what only one may do."""
        return self.rank == 0

    def decide_first(self, decide: Callable[[], Value]) -> Value:
        """What the first process finds out; the others wait for it.

        Raises:
            UsageError: it refuses; every process does.
        """
        return decide() if self.status is None else self.status.decide_first(self.is_first, decide)

    def share(self, work: Sequence[Value]) -> list[Value]:
        """This process' part of the work: every `size`-th piece, so that no process is left the shorter ones."""
        return list(work[self.rank :: self.size])

    def wait(self) -> None:
        """Until every process is here.

        Raises:
            RunFailed: one has ended.
        """
        if self.status is not None:
            self.status.worst(0)


ALONE = Team()


@contextlib.contextmanager
def team_of_launcher(config: "PrepareConfig") -> Iterator[Team]:
    """The processes that the launcher has started, which are there, and started alike.

    Raises:
        UsageError: they differ, do not see each other, or do not share --data_dir.
        RunFailed: they do not reach each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    from processes import RankStatus, start_processes

    accelerator = start_processes([], config.data_dir, SECONDS_TO_WAIT)
    try:
        status = RankStatus(accelerator, SECONDS_TO_WAIT)
        check_hosts_agree(status, config)
        check_shared_folder(status, accelerator.is_main_process, Path(config.data_dir))
        on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Team(accelerator.process_index, accelerator.num_processes, on_this_host, status)
    finally:
        accelerator.end_training()
