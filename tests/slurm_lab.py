"""A real Slurm of three nodes on this machine, for tests: munged, slurmctld and slurmds, all below one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NODES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sinfo", "setpriv")

# cred_expire is how long a requeued job waits, 5 s at least; FirstJobId: ports are made from ids, and two clusters may
# run at once; KillWait: what a job that is cancelled has to save; GraceTime: what one has that makes room for `high`.
CONF = """
ClusterName=lab
FirstJobId={first_job}
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={root}/munge/sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobRequeue=1
KillWait=10
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
NodeName=127.0.0.2 NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs=2 RealMemory=1000000 State=UNKNOWN
NodeName=127.0.0.3 NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs=2 RealMemory=1000000 State=UNKNOWN
GresTypes=gpu
NodeName=127.0.0.4 NodeHostname={host} NodeAddr={address} Port={ports[3]} CPUs=16 RealMemory=1000000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=127.0.0.[2-3] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=127.0.0.[2-3] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=127.0.0.4 MaxTime=INFINITE State=UP
"""
# Two devices that every machine has stand for GPUs: what Slurm promises of them can be seen, computing is the CPU's.
GPUS = "NodeName=127.0.0.4 Name=gpu File=/dev/null\nNodeName=127.0.0.4 Name=gpu File=/dev/zero\n"


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks (Debian: slurm-wlm and munge)."""
    return [name for name in DAEMONS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class SlurmLab:
    """Context manager; `env` is what a client needs. Node names are loopback addresses, usable as MASTER_ADDR."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        self.root = root = Path(self._folder.name)  # its sockets' names must stay below 108 characters
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = outside | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmLab:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        self._folder.cleanup()

    def start_node(self, name: str) -> None:
        """Bring up a node that was killed, or the first time."""
        self._nodes[name] = self._spawn("slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """As if its power was cut: Slurm's processes there and all that they have started. Slurm is not told."""
        self._nodes[name].kill()
        tasks = _processes_of(name, self.root)
        # A step's keeper, which hides its environment, goes before its tasks, of whose end it would still report.
        keepers = {_parent(task) for task in tasks} - set(tasks) - {1, os.getpid()}
        for pid in [*keepers, *tasks]:
            _kill(pid)

    def _start(self) -> None:
        for name in ("munge", "state", "spool", "run", "log"):
            (self.root / name).mkdir(parents=True)
        munge = self.root / "munge"
        munge.chmod(0o711)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(
            host=host,
            address=socket.gethostbyname(host),
            user=getpass.getuser(),
            root=self.root,
            ports=_free_ports(4),
            first_job=1 + int(time.time() * 10) % 60_000_000,
        )
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "gres.conf").write_text(GPUS)
        sock = munge / "sock"
        files = [f"--{kind}-file={munge}/{kind}" for kind in ("key", "pid", "log", "seed")]
        self._spawn("munged", "--foreground", "--force", f"--socket={sock}", *files)
        _until(sock.exists, "munged")
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        _until(lambda: self._states() == ["idle"] * len(NODES), "slurmd")

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.root / "log" / f"{command[0]}.out").open("ab") as out:
            # A test that is killed leaves no cluster behind.
            mortal = ["setpriv", "--pdeathsig", "KILL", *command]
            daemon = subprocess.Popen(mortal, env=self.env, stdout=out, stderr=out, cwd=self.root)
        self._daemons.append(daemon)
        return daemon

    def _states(self) -> list[str]:
        command = ["sinfo", "-h", "-N", "-o", "%N %T"]
        shown = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        return [state for _, state in sorted({tuple(line.split()) for line in shown.stdout.splitlines()})]


def _processes_of(node: str, root: Path) -> list[int]:
    """What runs in jobs on a node of the cluster below `root`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={root}/slurm.conf".encode()} <= set(variables):
            found.append(int(folder.name))
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 1


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _until(done: object, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come up within {seconds:.0f} s")
        time.sleep(0.05)
