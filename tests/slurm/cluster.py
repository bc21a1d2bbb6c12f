"""A real Slurm of a few virtual nodes on this machine: munged, slurmctld and one slurmd for each node, in a folder.

Not a mock: Debian's daemons with a configuration of their own. Where the machine lets a process have namespaces, every
node has its own host name, address and cable; elsewhere all nodes share 127.0.0.1. The one idea: everything runs below
one holder process, which ends when its standard input closes. So nothing outlives the test, whatever becomes of it.

Run as a program this file is the holder: `python cluster.py hold FOLDER NODES {own,shared}`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLI_LIMIT_SECONDS = 30.0
START_LIMIT_SECONDS = 60.0
CPUS, GPUS = 8, 8
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
REPOSITORY = Path(__file__).resolve().parents[2]
UNSHARED = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# Debian puts the daemons there; a user's PATH may lack it.
SBIN = "/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=megagrok
SlurmctldHost={controller}({controller_address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=5
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
EnforcePartLimits=ALL
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=1-00:00:00 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=1-00:00:00 State=UP
"""
# Inert, and read by every slurmd: without it one looks for a systemd that is not there.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
# In this node's own namespaces. The cable is plugged in from outside, a moment later.
NODE = """\
hostname {name}
mount --bind {root}/hosts /etc/hosts
ip link set lo up
until ip link show cable >/dev/null 2>&1; do sleep 0.01; done
ip address add {address}/24 dev cable
ip link set cable up
exec slurmd -D -N {name}
"""


def missing() -> str | None:
    """What keeps this machine from running a Slurm, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurmctld slurmd slurm-client munge iproute2 util-linux"
    return None


def can_have_namespaces() -> bool:
    """Whether nodes can have host names, addresses and cables of their own."""
    links = "ip link add name probe0 type bridge && ip link add name probe1 type veth peer name probe2"
    program = f"{links} && mount --bind /etc/hosts /etc/hosts"
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run([*UNSHARED, "sh", "-c", program], capture_output=True, timeout=10).returncode == 0
    return False


@dataclass(frozen=True, slots=True)
class Ran:
    """A command on the login node that came to its end."""

    status: int
    out: str
    err: str


class Cluster:
    """A running Slurm. `call` is a shell on its login node; `close` must be called."""

    def __init__(self, root: Path, *, num_nodes: int = 3) -> None:
        self.root = root
        self.has_own_nodes = can_have_namespaces()
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        mode = "own" if self.has_own_nodes else "shared"
        hold = [sys.executable, str(Path(__file__).resolve()), "hold", str(root), str(num_nodes), mode]
        with (root / "holder.log").open("w", encoding="utf-8") as log:
            self._holder = subprocess.Popen(
                [*(UNSHARED if self.has_own_nodes else ()), *hold],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=root,
                env=self._environment({}),
            )  # fmt: skip
        try:
            self._wait_until_idle()
        except BaseException:
            self.close()
            raise

    def call(
        self, *command: object, folder: Path | None = None, environment: Mapping[str, str] | None = None,
        limit_seconds: float = CLI_LIMIT_SECONDS,
    ) -> Ran:  # fmt: skip
        """Run a command on the login node, for so long at the most."""
        # Entering a mount namespace leaves the working directory behind.
        words = [*self._entrance(), "env", f"--chdir={folder or self.root}", *(str(word) for word in command)]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=limit_seconds,
            env=self._environment(environment or {}), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    def output(self, *command: object) -> str:
        """What a command prints that has to succeed."""
        ran = self.call(*command)
        assert ran.status == 0, f"{command}: {ran.status}\n{ran.out}\n{ran.err}"
        return ran.out

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        words = self.output("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: int, *states: str, limit_seconds: float = 60.0) -> dict[str, str]:
        """Poll until the job is in one of the states. Not `sbatch --wait`, which looks every 2 to 40 s."""
        deadline = time.monotonic() + limit_seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job}, not {states}, after {limit_seconds:g} s"
            time.sleep(0.1)
        return job

    def clear(self) -> None:
        """No job is left, and every node is back."""
        self.call("scancel", "--full", "--state=RUNNING,PENDING,SUSPENDED", f"--user={os.getuid()}")
        self.call("scancel", f"--user={os.getuid()}")
        self._wait_until_idle()

    def unplug(self, node: str) -> None:
        """Pull the node's cable. Its processes live on."""
        self.output("ip", "link", "set", f"v{self.nodes.index(node) + 1}", "down")

    def plug(self, node: str) -> None:
        """Put the cable back."""
        self.output("ip", "link", "set", f"v{self.nodes.index(node) + 1}", "up")

    def switch_off(self, node: str) -> None:
        """Cut the node's power: slurmd is the first process of its node, and the rest dies with it."""
        self.output("kill", "-KILL", (self.root / f"{node}.pid").read_text(encoding="utf-8"))

    def close(self) -> None:
        """End everything. In namespaces the kernel does it; otherwise the holder."""
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._holder.pid, signal.SIGKILL)
            self._holder.wait(timeout=20)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a message."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.root.glob("*.log")))

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + START_LIMIT_SECONDS
        while True:
            if (self.root / "ready").exists():
                states = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").out.split()
                jobs = self.call("squeue", "--noheader").out.strip()
                if states == ["idle"] * len(self.nodes) and not jobs:
                    return
            alive = self._holder.poll() is None
            assert alive and time.monotonic() < deadline, f"the cluster is not idle:\n{self.logs()}"
            time.sleep(0.05)

    def _entrance(self) -> list[str]:
        if not self.has_own_nodes:
            return []
        held = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0])
        return ["nsenter", f"--target={held}", "--net", "--mount", "--uts", "--pid", "--"]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        # Jobs inherit it, and nodes find this very repository, installed or not.
        own = {"PATH": _path(), "SLURM_CONF": str(self.root / "slurm.conf"), "PYTHONPATH": str(REPOSITORY)}
        return {**kept, **own, **more}


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{SBIN}"


def _hold(root: Path, num_nodes: int, has_own_nodes: bool) -> None:
    """Start the daemons and keep them until standard input closes. In its own namespaces, this is process 1."""
    nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _write_configuration(root, nodes, has_own_nodes)
        if has_own_nodes:
            _run("hostname", "login")
            _run("mount", "--bind", f"{root}/hosts", "/etc/hosts")
            _run("ip", "link", "set", "lo", "up")
            _run("ip", "link", "add", "bridge0", "type", "bridge")
            _run("ip", "address", "add", "10.77.0.254/24", "dev", "bridge0")
            _run("ip", "link", "set", "bridge0", "up")
        munged = ("munged", "--foreground", "--force", f"--key-file={root}/munge.key", f"--socket={root}/munge.socket")
        files = (f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log", f"--seed-file={root}/munge.seed")
        daemons.append(subprocess.Popen([*munged, *files]))
        while not (root / "munge.socket").exists():
            time.sleep(0.01)
        daemons.append(subprocess.Popen(["slurmctld", "-D", "-c"]))
        for number, name in enumerate(nodes, start=1):
            daemons.append(_start_node(root, name, number, has_own_nodes))
        (root / "ready").touch()
        sys.stdin.buffer.read()
    finally:
        # Process 1 takes the rest of its namespace with it. Elsewhere steps have to be asked.
        if not has_own_nodes:
            subprocess.run(["scancel", f"--user={os.getuid()}"], timeout=10, check=False)
            time.sleep(1)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(timeout=5)
            _kill_steps(root)


def _start_node(root: Path, name: str, number: int, has_own_nodes: bool) -> subprocess.Popen[bytes]:
    if not has_own_nodes:
        return subprocess.Popen(["slurmd", "-D", "-N", name])
    script = NODE.format(name=name, root=root, address=f"10.77.0.{number}")
    node = subprocess.Popen([*UNSHARED, "sh", "-ec", script])
    (root / f"{name}.pid").write_text(str(node.pid), encoding="utf-8")
    # unshare has to be past its own call before the cable's end goes into its namespace.
    here = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{node.pid}/ns/net") == here:
        time.sleep(0.01)
    _run("ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", "cable", "netns", str(node.pid))
    _run("ip", "link", "set", f"v{number}", "master", "bridge0", "up")
    return node


def _write_configuration(root: Path, nodes: Sequence[str], has_own_nodes: bool) -> None:
    for folder in ("state", "gpus"):
        (root / folder).mkdir()
    for number in range(GPUS):
        # Slurm wants a device and looks no closer.
        (root / "gpus" / f"nvidia{number}").symlink_to("/dev/null")
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    hosts = ["127.0.0.1 localhost", "10.77.0.254 login"]
    hosts += [f"10.77.0.{number} {name}" for number, name in enumerate(nodes, start=1)]
    (root / "hosts").write_text("\n".join(hosts) + "\n", encoding="utf-8")
    ports = _free_ports(len(nodes) + 1)
    lines = [
        f"NodeName={name} NodeAddr={f'10.77.0.{number}' if has_own_nodes else '127.0.0.1'} Port={ports[number]} "
        f"CPUs={CPUS} RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
        for number, name in enumerate(nodes, start=1)
    ]
    host = "login" if has_own_nodes else socket.gethostname()
    address = "10.77.0.254" if has_own_nodes else "127.0.0.1"
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    text = SLURM_CONF.format(
        root=root, port=ports[0], user=user, controller=host, controller_address=address, nodes="\n".join(lines)
    )
    (root / "slurm.conf").write_text(text, encoding="utf-8")
    (root / "gres.conf").write_text(f"NodeName={','.join(nodes)} Name=gpu File={root}/gpus/nvidia[0-{GPUS - 1}]\n")
    (root / "cgroup.conf").write_text(CGROUP_CONF, encoding="utf-8")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _kill_steps(root: Path) -> None:
    """Kill what still has this cluster's configuration in its environment: steps that outlived their slurmd."""
    mark = f"SLURM_CONF={root}/slurm.conf".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=10)


if __name__ == "__main__":
    _, _, folder, count, mode = sys.argv
    _hold(Path(folder), int(count), mode == "own")
