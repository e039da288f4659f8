"""Hosts on this machine: each with a name, an address, processes and mounts of its own, joined by an Ethernet bridge of theirs.

A host is a set of Linux namespaces, kept by its first process. When that is killed the kernel ends all that runs on the host, as when
a machine loses power. Nothing leaves these namespaces, and nothing is left of them. Files are shared, as on a cluster's storage.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

TOOLS = ("unshare", "setpriv", "nsenter", "ip", "tc", "nft")
NETWORK = "10.77.0"
HEAD = "head"
_FIRST_PROCESS = "trap : TERM; echo up; while sleep 1000 & wait; do :; done"
"""Waits for what others leave behind, as the first process of a machine does."""
_WITH_THIS_PROCESS = ["setpriv", "--pdeathsig", "KILL"]
"""Also where it is killed: no host outlives the tests."""
_UNSHARE = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
_ALL_THAT_IS_NEEDED = """set -e
hostname probe
mount --bind /etc/hosts /etc/hosts
ip link set lo up
ip link add name bridge0 type bridge
ip link add name wire0 type veth peer name wire1
tc qdisc add dev wire0 root tbf rate 1mbit burst 16kb latency 50ms
nft add table inet loss
"""


def why_not() -> str | None:
    """Why no hosts can be made here; None if they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: apt-get install iproute2 util-linux nftables)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    allowed = subprocess.run([*_UNSHARE, "sh", "-c", _ALL_THAT_IS_NEEDED], capture_output=True, text=True, check=False)
    return f"cannot make hosts of namespaces: {allowed.stderr.strip()}" if allowed.returncode else None


class Host:
    """One of them, switched on.

    Args:
        hosts_file: names and addresses, as /etc/hosts.
    """

    def __init__(self, name: str, address: str, hosts_file: Path) -> None:
        self.name, self.address, self.hosts_file = name, address, hosts_file
        command = [*_WITH_THIS_PROCESS, *_UNSHARE, "sh", "-c", _FIRST_PROCESS]
        self.keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        assert self.keeper.stdout is not None and self.keeper.stdout.readline() == b"up\n"
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        self.pid = int(children[0])
        self.run("hostname", name)
        self.run("mount", "--bind", str(hosts_file), "/etc/hosts")
        self.run("ip", "link", "set", "lo", "up")

    def inside(self, *command: object) -> list[str]:
        """The command that runs a command on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--ipc", "--pid", "--mount", "--wd=.", "--", *map(str, command)]

    def run(self, *command: object, timeout: float = 60, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """What a command prints.

        Raises:
            AssertionError: it failed, unless `check` is off.
        """
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=timeout, env=env, check=False)
        assert not check or done.returncode == 0, f"{self.name}: {' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *command: object, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a program that stays; it ends with the host."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.inside(*command), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=cwd
            )

    def resolve(self, *lines: str) -> None:
        """From now on names resolve here as these lines of /etc/hosts say, besides localhost."""
        hosts_file = self.hosts_file.with_name(f"hosts.{self.name}")
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        self.run("mount", "--bind", hosts_file, "/etc/hosts")

    def add_bridge(self, name: str, address: str) -> None:
        """An interface with no wire: no other host can reach its address."""
        self.run("ip", "link", "add", "name", name, "type", "bridge")
        self.run("ip", "address", "add", address, "dev", name)
        self.run("ip", "link", "set", name, "up")

    def slow(self, rate: str, queue_bytes: int = 30_000) -> None:
        """Send at most at a rate (tc's words: 1mbit). What does not fit into the queue is lost."""
        limits = ["rate", rate, "burst", "5kb", "limit", queue_bytes]
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limits)

    def sent(self) -> dict[str, Any]:
        """tc's statistics of a slow link: `packets` and `bytes` sent, `drops`, and `overlimits`: how often a packet had to wait."""
        return json.loads(self.run("tc", "-s", "-j", "qdisc", "show", "dev", "eth0"))[0]

    def lossy(self, percent: int) -> None:
        """Of the packets that come, lose so many, drawn at random."""
        self.run("nft", "add", "table", "inet", "loss")
        self.run("nft", "add", "chain", "inet", "loss", "arrival", "{ type filter hook input priority 0; }")
        drawn = ["meta", "iifname", "eth0", "numgen", "random", "mod", "100", "<", percent]
        self.run("nft", "add", "rule", "inet", "loss", "arrival", *drawn, "counter", "drop")

    def lost(self) -> int:
        """How many packets were lost on arrival."""
        rules = json.loads(self.run("nft", "-j", "list", "chain", "inet", "loss", "arrival"))["nftables"]
        counted = [part["counter"]["packets"] for rule in rules for part in rule.get("rule", {}).get("expr", []) if "counter" in part]
        return int(counted[0])

    def off(self) -> None:
        """Cut the power: no process says goodbye, and no packet is answered."""
        subprocess.run(self.inside("ip", "link", "set", "eth0", "down"), capture_output=True, check=False)
        if self.keeper.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.keeper.wait(20)
        if self.keeper.stdout is not None:
            self.keeper.stdout.close()


class Hosts:
    """Some hosts, and a head to which they are wired. A context.

    Args:
        names: of the hosts besides the head.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.addresses = {HEAD: f"{NETWORK}.1"} | {name: f"{NETWORK}.{11 + number}" for number, name in enumerate(names)}
        self.on: dict[str, Host] = {}

    def __enter__(self) -> Hosts:
        self.scratch = tempfile.TemporaryDirectory()
        self.hosts_file = Path(self.scratch.name) / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        self.hosts_file.write_text("\n".join(lines) + "\n")
        try:
            head = self.on[HEAD] = Host(HEAD, self.addresses[HEAD], self.hosts_file)
            head.run("ip", "link", "add", "name", "eth0", "type", "bridge")
            _address(head)
            for name in list(self.addresses)[1:]:
                self.switch_on(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for host in reversed(self.on.values()):
            host.off()
        self.scratch.cleanup()

    def __getitem__(self, name: str) -> Host:
        return self.on[name]

    @property
    def head(self) -> Host:
        return self.on[HEAD]

    def wire(self, name: str, state: str) -> None:
        """Pull a host's wire (down), or plug it in again (up). Addresses stay."""
        self.head.run("ip", "link", "set", f"to-{name}", state)

    def switch_on(self, name: str) -> Host:
        """Also after it was switched off: a host of the same name and address, on which nothing runs yet."""
        host = self.on[name] = Host(name, self.addresses[name], self.hosts_file)
        wire = f"to-{name}"
        # Of the head only its network: it could not see the other host's first process.
        on_head = ["nsenter", "--target", str(self.head.pid), "--net", "ip", "link"]
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
        # The kernel takes a dead host's wire away when it finds the time.
        subprocess.run([*on_head, "delete", wire], stderr=subprocess.DEVNULL, check=False)
        subprocess.run([*on_head, "add", "name", wire, *peer], check=True)
        subprocess.run([*on_head, "set", wire, "master", "eth0", "up"], check=True)
        _address(host)
        return host


def _address(host: Host) -> None:
    host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "link", "set", "eth0", "up")
