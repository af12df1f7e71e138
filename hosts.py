"""What the hosts of a run must have in common: a way to each other, settings, versions, a folder, data.

Found out before anything is written, and named: a run whose hosts differ would train on something else than it says.
"""

import contextlib
import hashlib
import importlib.metadata
import ipaddress
import os
import platform
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from atomic import nearest_existing
from errors import UsageError

if TYPE_CHECKING:
    from config import EvaluateConfig, PrepareConfig, TrainConfig
    from processes import RankStatus

# Where a host finds what all of them have (its content is compared), and what its hardware allows.
OWN_SETTINGS = (
    *("model_name_or_path", "data_dir", "output_dir", "corpus", "audio_root"),
    *("dataloader_num_workers", "num_workers", "memory_limit_mb", "drop_list", "compare"),
)
# Other versions may round, draw or save differently.
PACKAGES = ("torch", "transformers", "accelerate", "numpy")
TOKEN_PREFIX = ".shared_"
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
# By which the launcher asks for FSDP.
SHARDING_VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_")
# Longer ones (the shape of a model) are named without their values.
CHARACTERS_SHOWN = 60
ABSENT = "absent"


def talk_over_reachable_interface() -> None:
    """Let gloo use the network interface that leads to the first host, where several hosts make a run.

    Left alone it takes the address of the host's own name, which many an /etc/hosts says is 127.0.0.1: then no other
    host can connect. An interface that the user has named stands.

    Raises:
        UsageError: the first host's name leads to 127.0.0.1 here.
    """
    is_several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    first = os.environ.get("MASTER_ADDR", "")
    if not is_several or not first or INTERFACE_VARIABLE in os.environ:
        return
    with contextlib.suppress(OSError):  # a name that is not found is said when the processes meet
        own = _own_address_towards(first)
        if own.is_loopback and not _is_loopback(first):
            raise UsageError(
                f"{first}, the first host of the run, is {own} on this host, which no other host can reach: give its "
                f"address as --main_process_ip, or name the network interface, export {INTERFACE_VARIABLE}=eth0"
            )
        for name, addresses in psutil.net_if_addrs().items():
            if any(_is_address(one.address, own) for one in addresses):
                os.environ[INTERFACE_VARIABLE] = name
                return


def check_hosts_agree(status: "RankStatus", config: "TrainConfig | EvaluateConfig | PrepareConfig") -> None:
    """Every process must have been started alike: settings, the launcher's precision and FSDP, versions, this program.

    Raises:
        UsageError: what differs, with the values and who has them.
    """
    settings = {f"--{name}": value for name, value in asdict(config).items() if name not in OWN_SETTINGS}
    precision = {"--mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no")}
    versions = {"the version of python": platform.python_version()}
    versions |= {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    sharding = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SHARDING_VARIABLES)}
    facts = settings | precision | sharding | versions | {"the source of this program": _source_digest()}
    check_same(status, facts, "start every host with the same command, --config file and installation")


def check_same(status: "RankStatus", facts: Mapping[str, object], remedy: str) -> None:
    """Compare facts by name over all processes.

    Args:
        status: of this process.
        facts: values that can be compared.
        remedy: ends the message.

    Raises:
        UsageError: on every process, what differs from the first process.
    """
    everyones = status.gather((socket.gethostname(), dict(facts)))
    first_host, first = everyones[0]
    different: dict[str, str] = {}
    for rank, (host, other) in enumerate(everyones):
        for name in [*first, *(name for name in other if name not in first)]:
            mine, theirs = first.get(name, ABSENT), other.get(name, ABSENT)
            if mine != theirs and name not in different:
                different[name] = f"{_shown(mine)} on {first_host}, {_shown(theirs)} on {host} (rank {rank})"
    if different:
        listed = "; ".join(f"{name} is {values}" for name, values in different.items())
        raise UsageError(f"the processes of this run differ: {listed}: {remedy}")


def check_shared_folder(status: "RankStatus", is_first: bool, folder: Path) -> None:
    """Every process must see in `folder`, which need not exist yet, what the first one writes there.

    Raises:
        UsageError: on every process, some hosts have another folder of this name.
    """
    if len(hosts := status.gather(socket.gethostname())) == 1:
        return
    # A name that no host has looked for before: network file systems remember for a while what was not there.
    token = status.decide_first(is_first, lambda: _leave_token(folder))
    try:
        sees = (nearest_existing(folder) / token).exists()
        everyone_sees = status.gather(sees)
    finally:
        if is_first:
            (nearest_existing(folder) / token).unlink(missing_ok=True)
    if not all(everyone_sees):
        blind = sorted({f"{host} (rank {rank})" for rank, host in enumerate(hosts) if not everyone_sees[rank]})
        raise UsageError(
            f"{folder} is not the same folder on every host: {', '.join(blind)} does not see what the first process "
            "writes there: name a folder on storage that the hosts share"
        )


def _leave_token(folder: Path) -> str:
    token = f"{TOKEN_PREFIX}{uuid.uuid4().hex}"
    try:
        (nearest_existing(folder) / token).touch()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): name another folder") from error
    return token


def _own_address_towards(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """This host's address on the way to `host`; nothing is sent."""
    port = int(os.environ.get("MASTER_PORT", "1"))
    family, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])


def _is_address(text: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    with contextlib.suppress(ValueError):  # psutil lists hardware addresses too
        return ipaddress.ip_address(text.partition("%")[0]) == address
    return False


def _is_loopback(host: str) -> bool:
    """Whether the user has said that all processes are on this host."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= CHARACTERS_SHOWN else "another value"
