"""A Slurm cluster on hosts of this machine: controller, accounting and its database on the head, one daemon on each node.

Everything is of this cluster alone: keys, sockets, state and database are in its folder, and end with it. Users are on the head.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster.hosts import Host, Hosts
from tests.cluster.hosts import why_not as why_no_hosts

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "sacct", "scontrol", "munged", "mariadbd", "mariadb-install-db")
PACKAGES = "slurmctld slurmd slurm-client slurmdbd munge mariadb-server iproute2"
SECONDS_TO_COME_UP = 60
KILL_WAIT_S = 10
"""From SIGTERM to SIGKILL when a job is cancelled; Slurm's default is 30."""
NODE_DEAD_S = 10
"""Without an answer, until a node counts as down; Slurm's default is 300."""

_SLURM_CONF = """
ClusterName=triptych
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=head
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout={node_dead}
KillWait={kill_wait}
JobRequeue=1
PartitionName=dev Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} CPUs=4 RealMemory=8000 State=UNKNOWN\n"
_SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=head
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass={password}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])


def why_not() -> str | None:
    """Why no cluster can be brought up here; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    return f"needs {', '.join(missing)} (Debian: apt-get install {PACKAGES})" if missing else why_no_hosts()


class Slurm:
    """The cluster. A context.

    Args:
        folder: an empty one that all may write to.
        nodes: their names.
    """

    def __init__(self, folder: Path, nodes: Sequence[str] = ("n1", "n2")) -> None:
        self.folder, self.nodes = folder, nodes
        checkout = str(Path(__file__).parents[2])
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH, "PYTHONPATH": checkout}
        self.hosts = Hosts(nodes)

    def __enter__(self) -> Slurm:
        self.hosts.__enter__()
        try:
            self._configure()
            self._start_accounting()
            self.head.start("slurmctld", "-D", log=self.folder / "slurmctld.out", env=self.env)
            for name in self.nodes:
                self.start_node(name)
            self.wait_for(lambda: all(self.state_of(name).startswith("idle") for name in self.nodes), "all nodes idle")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hosts.__exit__(kind, error, trace)

    @property
    def head(self) -> Host:
        return self.hosts.head

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        password = secrets.token_hex()
        facts = {"folder": self.folder, "head": self.head.address, "password": password, "kill_wait": KILL_WAIT_S, "node_dead": NODE_DEAD_S}
        nodes = "".join(_NODE.format(name=name, address=self.hosts.addresses[name]) for name in self.nodes)
        (self.folder / "slurm.conf").write_text(nodes + _SLURM_CONF.format(**facts))
        for name in ("slurmdbd.conf", "munge.key"):
            (self.folder / name).touch(mode=0o600)
        (self.folder / "slurmdbd.conf").write_text(_SLURMDBD_CONF.format(**facts))
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        self.password = password

    def _start_accounting(self) -> None:
        """Credentials, database and accounting, one after the other."""
        own = [f"--{what}-file={self.folder / 'munge'}.{what}" for what in ("key", "pid", "seed", "log")]
        socket = self.folder / "munge.socket"
        self.head.start("munged", "--foreground", "--force", f"--socket={socket}", *own, log=self.folder / "munged.out")
        data, sql_socket = self.folder / "database", self.folder / "database.socket"
        self.head.run("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db", timeout=120)
        small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=64M", "--innodb-lock-wait-timeout=900"]
        where = [f"--datadir={data}", f"--socket={sql_socket}", "--bind-address=127.0.0.1", f"--pid-file={self.folder / 'database.pid'}"]
        self.head.start("mariadbd", "--no-defaults", "--user=root", *where, *small, log=self.folder / "mariadbd.out")
        grant = f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{self.password}'; GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';"
        self.wait_for(lambda: _works(self.head.inside("mariadb-admin", f"--socket={sql_socket}", "ping")), "the database")
        self.head.run("mariadb", f"--socket={sql_socket}", "-e", grant)
        self.wait_for(socket.exists, "munged")
        self.head.start("slurmdbd", "-D", log=self.folder / "slurmdbd.out", env=self.env)
        self.wait_for(lambda: _works(self.head.inside("sacctmgr", "-n", "show", "cluster"), self.env), "slurmdbd")
        self.head.run("sacctmgr", "-i", "add", "cluster", "triptych", env=self.env)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, whose host was switched on."""
        # -b: the host has just booted, which Slurm would otherwise take from the time of the machine that all hosts are on.
        self.hosts[name].start("slurmd", "-D", "-b", "-N", name, log=self.folder / f"slurmd-{name}.out", env=self.env)

    def state_of(self, node: str) -> str:
        return self.user("sinfo", "-h", "-n", node, "-o", "%T").strip()

    def user(self, *command: object, timeout: float = 60, check: bool = True) -> str:
        """What a command of a user on the head prints."""
        return self.head.run(*command, timeout=timeout, check=check, env=self.env)

    def wait_for(self, is_so: Callable[[], bool], what: str, seconds: float = SECONDS_TO_COME_UP) -> float:
        """Returns how many seconds it took.

        Raises:
            AssertionError: it took longer than `seconds`; shows the ends of the daemons' logs.
        """
        began = time.monotonic()
        while not is_so():
            assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s\n{self._logs()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def _logs(self) -> str:
        logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs if path.stat().st_size)


def _works(command: list[str], env: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, capture_output=True, env=env, check=False).returncode == 0
