"""Two hosts as two network namespaces with a cable between them: one run, and what happens when a host goes away."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, TALKATIVE, TINY_MODEL, write_recipe
from test_ddp import (  # noqa: F401 - fixtures
    SECONDS_FOR_A_RUN,
    Ranks,
    free_port,
    read_table,
    repeatable,
    run_ranks,
    server,
)

from checkpoint import find_damage, list_checkpoints

DDP_TIMEOUT_SECONDS = 10
# Of a host that is left alone, after --ddp_timeout: Python, torch and the launcher end.
SECONDS_TO_END = 60
# Starts a program under a host name of its own, on one core.
AS_HOST = 'echo "$0" > /proc/sys/kernel/hostname && exec taskset -c "$@"'


@dataclass
class Hosts:
    """Two hosts with one file system."""

    namespaces: list[str]
    interfaces: list[str]
    launchers: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *arguments: object, of_second: tuple[object, ...] = (), before_second: str = "") -> None:
        """The same command on both, as a user types it; the second host may be given more, or a shell command first."""
        port = free_port()
        for number, namespace in enumerate(self.namespaces):
            launch = [
                Path(sys.executable).parent / "accelerate", "launch", "--multi_gpu", "--num_machines", 2,
                "--num_processes", 2, "--machine_rank", number, "--main_process_ip", "10.77.0.1",
                "--main_process_port", port, "--mixed_precision", "no", *arguments, *(of_second if number else ()),
            ]  # fmt: skip
            script = f"{before_second} && {AS_HOST}" if number and before_second else AS_HOST
            inside = ["ip", "netns", "exec", namespace, "unshare", "--uts", "--mount", "sh", "-c", script]
            environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
            core = sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]
            self.launchers.append(
                subprocess.Popen(
                    [*inside, f"host{number}", str(core), *map(str, launch)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=REPOSITORY,
                    env=environment | {"OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            )

    def wait(self, seconds: float = SECONDS_FOR_A_RUN) -> list[str]:
        """What the hosts have said at their end."""
        said = [""] * len(self.launchers)

        def read(number: int) -> None:
            said[number] = self.launchers[number].stdout.read()

        readers = [threading.Thread(target=read, args=(number,)) for number in range(len(said))]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + seconds
        for reader in readers:
            reader.join(max(0, deadline - time.monotonic()))
        is_late = any(reader.is_alive() for reader in readers)
        self.kill(0), self.kill(1)
        for reader in readers:
            reader.join()
        assert not is_late, "\n".join(said)
        return said

    def wait_for(self, line_start: str) -> None:
        """Until the first host has said it."""
        deadline = threading.Timer(SECONDS_FOR_A_RUN, lambda: (self.kill(0), self.kill(1)))
        deadline.start()
        said = []
        for line in self.launchers[0].stdout:
            said.append(line)
            if line.startswith(line_start):
                deadline.cancel()
                return
        raise AssertionError("".join(said))

    def kill(self, number: int) -> None:
        """All processes of a host, as when it loses its power; the kernel still closes their connections."""
        pids = subprocess.run(["ip", "netns", "pids", self.namespaces[number]], capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut_cable(self) -> None:
        """No packet passes any more, and nobody is told."""
        run_ip("-n", self.namespaces[1], "link", "set", self.interfaces[1], "down")

    @property
    def statuses(self) -> list[int]:
        return [launcher.wait(SECONDS_TO_END) for launcher in self.launchers]


def run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


_numbers = itertools.count()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Skips, with the reason, where namespaces cannot be made (root's right) or iproute2 is not installed."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or shutil.which("taskset") is None:
        pytest.skip("two hosts need the programs ip (iproute2), unshare and taskset (util-linux)")
    label = f"{os.getpid()}_{next(_numbers)}"
    found = Hosts([f"ctc_{label}_{side}" for side in "ab"], [f"v{label}{side}" for side in "ab"])
    with contextlib.ExitStack() as stack:
        for namespace in found.namespaces:
            made = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "delete", namespace], capture_output=True)
            run_ip("-n", namespace, "link", "set", "lo", "up")
        (first, second), (near, far) = found.namespaces, found.interfaces
        run_ip("link", "add", near, "netns", first, "type", "veth", "peer", "name", far, "netns", second)
        for number, (namespace, interface) in enumerate(zip(found.namespaces, found.interfaces, strict=True), 1):
            run_ip("-n", namespace, "address", "add", f"10.77.0.{number}/24", "dev", interface)
            run_ip("-n", namespace, "link", "set", interface, "up")
        try:
            yield found
        finally:
            for number, launcher in enumerate(found.launchers):
                found.kill(number)
                launcher.stdout.close()
                launcher.wait()


def recipe_of(tmp_path: Path, prepared: Path, **settings: object) -> Path:
    return write_recipe(
        tmp_path / "recipe.yaml", prepared,
        **{"model_config": TINY_MODEL | TALKATIVE, "per_device_train_batch_size": 4, "learning_rate": 1e-5} | settings,
    )  # fmt: skip


@pytest.mark.slow
def test_two_hosts_do_what_one_does(
    hosts: Hosts,
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    """Bit for bit as two processes of one host, and as one process but for rounding; one log, written by one."""
    recipe = recipe_of(tmp_path, prepared, max_steps=6, eval_steps=3, save_steps=3)
    hosts.start("train.py", "--config", recipe, "--output_dir", tmp_path / "two_hosts")
    said = hosts.wait()
    assert hosts.statuses == [0, 0], "\n".join(said)
    assert [one.count("finished: 6 updates") for one in said] == [1, 0]
    assert "step 1/6" not in said[1]
    found = Ranks([], [], [], [], tmp_path / "two_hosts")
    two = run_ranks(2, "two", "--config", recipe)
    assert repeatable(found) == repeatable(two)
    states = found.state(6), two.state(6)
    assert all(states[0][name].equal(states[1][name]) for name in states[1])
    one = run_ranks(1, "one", "--config", recipe, "--per_device_train_batch_size", 8)
    for name in ("train_loss", "eval_wer", "eval_cer", "eval_loss"):
        assert found.column(name) == pytest.approx(one.column(name), rel=1e-5, nan_ok=True), name


@pytest.mark.slow
@pytest.mark.parametrize("is_cut", [False, True], ids=["killed", "cut_off"])
def test_a_host_that_goes_away_stops_the_other_and_one_host_goes_on(
    is_cut: bool,
    hosts: Hosts,
    prepared: Path,
    tmp_path: Path,
    run_ranks: Callable[..., Ranks],  # noqa: F811
) -> None:
    """Without power, whose connections break, or without its cable, which nobody is told of."""
    recipe = recipe_of(tmp_path, prepared, max_steps=300, eval_steps=300, save_steps=7, do_predict=False)
    flags = ("--config", recipe, "--ddp_timeout", DDP_TIMEOUT_SECONDS)
    hosts.start("train.py", *flags, "--output_dir", tmp_path / "run")
    hosts.wait_for("step 20/")
    hosts.cut_cable() if is_cut else hosts.kill(1)
    went_at = time.monotonic()
    said = hosts.wait(SECONDS_TO_END + DDP_TIMEOUT_SECONDS)
    print("seconds until the other had ended:", time.monotonic() - went_at)
    print(said[0], "----", said[1])
    assert hosts.statuses[0] not in (0, -signal.SIGKILL)
    lost = "has not answered within --ddp_timeout (" if is_cut else "has ended ("
    lines = [line for line in said[0].splitlines() if line.startswith("failed: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"failed: another process of the run {lost}")
    assert not list_processes(tmp_path / "run")

    saved = list_checkpoints(tmp_path / "run")
    assert all(find_damage(folder) is None for folder in saved)
    step = int(saved[-1].name.removeprefix("step_"))
    assert 14 <= step < 300
    flags = (*flags, "--resume_from_checkpoint", "last")
    resumed = run_ranks(2, "run", *flags)
    assert f"at step {step} of 300" in resumed.stdout[0]
    whole = run_ranks(2, "whole", "--config", recipe, "--ddp_timeout", DDP_TIMEOUT_SECONDS)
    assert [resumed.trained(number - step) for number in range(step, 300)] == [
        whole.trained(number) for number in range(step, 300)
    ]
    assert repeatable(resumed) == repeatable(whole)


def list_processes(run_dir: Path) -> list[int]:
    """Of a run, by its command line."""
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if str(run_dir) in (process.info["cmdline"] or [])
    ]
