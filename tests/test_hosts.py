"""Two hosts as two network namespaces with a cable between them: one run, and what happens when a host goes away."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, TALKATIVE, TINY_MODEL, make_rows, write_part, write_recipe
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
from config import TrainConfig
from errors import RunFailed, UsageError
from hosts import (
    INTERFACE_VARIABLE,
    check_hosts_agree,
    check_same,
    check_shared_folder,
    talk_over_reachable_interface,
)
from processes import naming_lost_processes, naming_unreachable_processes

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
@pytest.mark.parametrize(
    ("gone", "is_cut"), [(1, False), (0, False), (1, True)], ids=["second_killed", "first_killed", "cut_off"]
)
def test_a_host_that_goes_away_stops_the_other_and_one_host_goes_on(
    gone: int,
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
    hosts.cut_cable() if is_cut else hosts.kill(gone)
    # Its end is what is waited for: by then the other has given up, has said so, and left no process behind.
    said = hosts.wait(SECONDS_TO_END + DDP_TIMEOUT_SECONDS)
    lost = "has not answered within --ddp_timeout (" if is_cut else "has ended ("
    for left in [0, 1] if is_cut else [1 - gone]:
        assert hosts.statuses[left] not in (0, -signal.SIGKILL)
        start = f"{'[rank 1] ' if left else ''}failed: another process of the run "
        (line,) = [line for line in said[left].splitlines() if "failed: " in line]
        assert line.startswith(start + lost)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("settings", "--learning_rate is 1e-05 on host0, 2e-05 on host1 (rank 1): start every host with the same"),
        ("data", "the train data is another value on host0, another value on host1 (rank 1); "),
        ("folder", "run is not the same folder on every host: host1 (rank 1) does not see what the first process "),
    ],
)
def test_hosts_that_are_no_one_run_are_refused(
    difference: str, message: str, hosts: Hosts, prepared: Path, tmp_path: Path
) -> None:
    """On both hosts, by name, with nothing written."""
    (tmp_path / "runs").mkdir()
    recipe = recipe_of(tmp_path, prepared)
    other_data = tmp_path / "other" / "data"
    write_part(other_data / "train" / "part_1", make_rows(13, seed=7))
    write_part(other_data / "dev" / "part_1", make_rows(5, seed=8))
    write_part(other_data / "test" / "part_1", make_rows(4, seed=3, speakers=("ann", "cem")))
    hosts.start(
        "train.py", "--config", recipe, "--output_dir", tmp_path / "runs" / "run",
        of_second={"settings": ("--learning_rate", 2e-5), "data": ("--data_dir", other_data)}.get(difference, ()),
        before_second=f"mount -t tmpfs tmpfs {tmp_path / 'runs'}" if difference == "folder" else "",
    )  # fmt: skip
    said = hosts.wait()
    assert 0 not in hosts.statuses
    for one in said:
        (line,) = [line for line in one.splitlines() if line.startswith("error: ")]
        assert message in line
    assert list((tmp_path / "runs").iterdir()) == []


# --- The checks by themselves --------------------------------------------------------------------------------------


class TwoRanks:
    """The status of the first of two ranks; what the other one answers is a function of what this one says."""

    def __init__(self, answer: Callable[[object], object] = lambda value: value) -> None:
        self.answer = answer

    def gather(self, value: object) -> list[object]:
        return [value, self.answer(value)]

    def decide_first(self, is_first: bool, decide: Callable[[], object]) -> object:
        assert is_first
        return decide()


def test_facts_that_differ_are_named_with_their_values() -> None:
    facts = {"--seed": 1, "the vocabulary": dict.fromkeys("ABCDEFGHIJKLMNOPQRST", 1), "case": "upper", "here": 1}
    other = {"--seed": 2, "the vocabulary": {}, "case": "upper", "there": 2}
    with pytest.raises(UsageError) as refused:
        check_same(TwoRanks(lambda _: ("host1", other)), facts, "start alike")
    host = socket.gethostname()
    assert str(refused.value) == (
        f"the processes of this run differ: --seed is 1 on {host}, 2 on host1 (rank 1); the vocabulary is another "
        f"value on {host}, {{}} on host1 (rank 1); here is 1 on {host}, absent on host1 (rank 1); there is absent on "
        f"{host}, 2 on host1 (rank 1): start alike"
    )
    check_same(TwoRanks(), facts, "start alike")


def test_hosts_may_differ_in_where_they_find_things_and_in_nothing_else() -> None:
    config = TrainConfig(data_dir="/mine")

    def start_other(**settings: object) -> TwoRanks:
        def answer(value: tuple[str, dict]) -> tuple[str, dict]:
            theirs = asdict(dataclasses.replace(config, **settings))
            return "host1", {name: theirs.get(name.removeprefix("--"), own) for name, own in value[1].items()}

        return TwoRanks(answer)

    check_hosts_agree(start_other(data_dir="/theirs", dataloader_num_workers=7), config)
    with pytest.raises(UsageError, match=r"--max_steps is -1 on .*, 5 on host1 \(rank 1\): start every host"):
        check_hosts_agree(start_other(max_steps=5), config)

    def undivided(value: tuple[str, dict]) -> tuple[str, dict]:
        return "host1", {name: one for name, one in value[1].items() if "FSDP" not in name}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UsageError, match=r"ACCELERATE_USE_FSDP is true on .*, absent on host1"):
            check_hosts_agree(TwoRanks(undivided), config)

    def older(value: tuple[str, dict]) -> tuple[str, dict]:
        return "host1", value[1] | {"the version of torch": "2.0", "the source of this program": "0"}

    with pytest.raises(UsageError, match=r"the version of torch is .*, 2\.0 on host1 .*; the source of this program"):
        check_hosts_agree(TwoRanks(older), config)


def test_a_folder_that_the_other_host_does_not_see_is_refused(tmp_path: Path, read_only_disk: Path) -> None:
    folder = tmp_path / "runs" / "run"
    check_shared_folder(TwoRanks(), True, folder)
    with pytest.raises(UsageError, match=r"run is not the same folder on every host: host1 \(rank 1\) does not see"):
        check_shared_folder(TwoRanks(lambda value: False if value is True else "host1"), True, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["read_only_disk"]
    with pytest.raises(UsageError, match=r"run cannot be written \(Read-only file system\): name another folder"):
        check_shared_folder(TwoRanks(), True, read_only_disk / "run")


@pytest.fixture
def of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(INTERFACE_VARIABLE, "")
    monkeypatch.delenv(INTERFACE_VARIABLE)
    return monkeypatch


def test_gloo_takes_the_interface_that_leads_to_the_first_host(of_two_hosts: pytest.MonkeyPatch) -> None:
    addresses = {
        name: one.address
        for name, ones in psutil.net_if_addrs().items()
        for one in ones
        if one.family == socket.AF_INET
    }
    for name, address in addresses.items():
        of_two_hosts.setenv("MASTER_ADDR", address)
        of_two_hosts.delenv(INTERFACE_VARIABLE, raising=False)
        talk_over_reachable_interface()
        assert os.environ[INTERFACE_VARIABLE] == name
    of_two_hosts.setenv(INTERFACE_VARIABLE, "ib0")
    talk_over_reachable_interface()
    assert os.environ[INTERFACE_VARIABLE] == "ib0"


def test_one_host_leaves_gloo_alone(of_two_hosts: pytest.MonkeyPatch) -> None:
    of_two_hosts.setenv("MASTER_ADDR", "127.0.0.1")
    of_two_hosts.setenv("LOCAL_WORLD_SIZE", "2")
    talk_over_reachable_interface()
    assert INTERFACE_VARIABLE not in os.environ


def test_a_first_host_whose_name_means_itself_is_refused(of_two_hosts: pytest.MonkeyPatch) -> None:
    """As /etc/hosts of Debian has it: no other host can reach 127.0.1.1."""
    of_two_hosts.setenv("MASTER_ADDR", "node1")
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 29500))]
    of_two_hosts.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UsageError, match=r"node1, the first host of the run, is 127\.0\.0\.1 on this host, .*=eth0"):
        talk_over_reachable_interface()


def test_processes_that_do_not_reach_each_other_are_told_so() -> None:
    unreachable = pytest.raises(RunFailed, match=r"do not reach each other \(\[gloo\] timed out connecting\): start")
    with unreachable, naming_unreachable_processes():
        raise RuntimeError("[gloo] timed out connecting\nand more")
    with pytest.raises(RuntimeError, match=r"^something else$"), naming_unreachable_processes():
        raise RuntimeError("something else")
    lost = pytest.raises(RunFailed, match=r"another process of the run has ended \(\[gloo\] Connection closed\)")
    with lost, naming_lost_processes():
        raise RuntimeError("[gloo] Connection closed")
