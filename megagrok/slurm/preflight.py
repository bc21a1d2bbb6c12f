"""Whether the nodes of a job are fit: each looks at itself, the supervisor compares, and who is unfit is named.

Not a benchmark and not a repair. The nodes answer on srun's output, not through files: an answer's arrival tells how
far a node's clock is off, and a node without the shared folder can still say so.
"""

import csv
import hashlib
import json
import os
import platform
import resource
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import megagrok
from megagrok.slurm.cluster import PreflightConfig
from megagrok.slurm.environment import gpus_shown, node_name

PREFIX = "megagrok-preflight "
BANDWIDTH_PREFIX = "megagrok-bandwidth "
_PACKAGES = (
    "torch", "megatron-core", "deepspeed", "transformer-engine", "safetensors", "numpy", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)  # fmt: skip
_QUERY = (
    "name", "driver_version", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)  # fmt: skip
_NVIDIA_SMI_SECONDS = 60
_TOKEN_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node found when it looked at itself."""

    node: str
    host: str
    at: float
    """Its clock when it answered, seconds since 1970."""
    gpus: int
    gpu_problems: list[str]
    versions: dict[str, str]
    """Whatever has to be the same on all nodes."""
    open_files: int
    """ulimit -n; -1 is unlimited. So with the next."""
    locked_bytes: int
    shm_bytes: int
    folder_problem: str
    """Why the run's folder is of no use from here; empty if it is."""


def look_at_this_node(folder: Path, token: str) -> NodeFacts:
    """What this node is like. A few tenths of a second, without torch; a task of srun's calls it on each node.

    folder: the probe's folder below the run's, made by the supervisor with a file `supervisor` that holds the token.
    """
    shown, gpu_problems, versions = _gpus()
    versions |= {"python": platform.python_version(), "megagrok": megagrok.__version__, "code": _code_digest()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return NodeFacts(
        node=node_name(),
        host=socket.gethostname(),
        gpus=shown,
        gpu_problems=gpu_problems,
        versions=versions,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shm_bytes=_size_of("/dev/shm"),
        folder_problem=_folder_problem(folder, token),
        at=time.time(),
    )


def answer(facts: NodeFacts) -> str:
    """The line that a node prints."""
    return PREFIX + json.dumps(asdict(facts))


def read_bandwidth(line: str) -> float | None:
    """The GB/s in a line of srun's output; None if it is something else."""
    _, found, text = line.partition(BANDWIDTH_PREFIX)
    try:
        return float(text) if found else None
    except ValueError:
        return None


def read_answer(line: str) -> NodeFacts | None:
    """The facts in a line of srun's output; None if it is something else."""
    _, found, text = line.partition(PREFIX)
    if not found:
        return None
    try:
        return NodeFacts(**json.loads(text))
    except (ValueError, TypeError):
        return None


def judge(
    answers: Mapping[str, NodeFacts],
    skews: Mapping[str, float],
    nodes: Sequence[str],
    *,
    gpus_per_node: int,
    needs_locked_memory: bool,
    limits: PreflightConfig,
) -> dict[str, list[str]]:
    """For each unfit node, every reason. `skews` are seconds by which a node's clock is ahead."""
    reasons: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        facts = answers.get(node)
        if facts is None:
            reasons[node].append(f"no answer within {limits.timeout_seconds} s")
            continue
        found = reasons[node]
        if facts.gpus < gpus_per_node:
            found.append(f"{facts.gpus} GPUs, needs {gpus_per_node}")
        found += facts.gpu_problems if gpus_per_node else []
        found += [facts.folder_problem] if facts.folder_problem else []
        if abs(skews.get(node, 0.0)) > limits.max_skew_seconds:
            found.append(f"clock {skews[node]:+.1f} s off, needs within {limits.max_skew_seconds:g} s: check NTP")
        if 0 <= facts.open_files < limits.min_open_files:
            found.append(f"ulimit -n {facts.open_files}, needs {limits.min_open_files}")
        if needs_locked_memory and facts.locked_bytes >= 0:
            found.append(f"memlock {facts.locked_bytes // 1024} KiB, needs unlimited: InfiniBand pins memory")
        if facts.shm_bytes < limits.min_shm_bytes:
            found.append(f"/dev/shm {facts.shm_bytes:,} bytes, needs {limits.min_shm_bytes:,}")
    for node, differing in _odd_ones_out(answers).items():
        reasons[node] += differing
    return {node: found for node, found in reasons.items() if found}


def make_probe(root: Path, token: str) -> Path:
    """The folder of a probe below the run's. The supervisor calls it. Raises OSError."""
    folder = root / f"preflight-{token}"
    folder.mkdir(parents=True)
    _write_through(folder / "supervisor", token)
    return folder


def unseen(folder: Path, nodes: Sequence[str], token: str) -> list[str]:
    """The nodes whose files do not arrive here. Network file systems may take seconds."""
    deadline = time.monotonic() + _TOKEN_PATIENCE_SECONDS
    while True:
        missing = [node for node in nodes if _read(folder / node) != token]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _odd_ones_out(answers: Mapping[str, NodeFacts]) -> dict[str, list[str]]:
    """Nodes that have another version than most."""
    odd: dict[str, list[str]] = {}
    for name in sorted({name for facts in answers.values() for name in facts.versions}):
        counts = Counter(facts.versions.get(name, "none") for facts in answers.values())
        usual, number = counts.most_common(1)[0]
        for node, facts in answers.items():
            if (version := facts.versions.get(name, "none")) != usual:
                odd.setdefault(node, []).append(f"{name} {version}, {number} other node(s) have {usual}")
    return odd


def _gpus() -> tuple[int, list[str], dict[str, str]]:
    """How many GPUs, what is wrong with them, and model and driver. Without nvidia-smi, what Slurm shows."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except FileNotFoundError:
        return gpus_shown(), [], {}
    except subprocess.TimeoutExpired:
        return 0, [f"nvidia-smi did not answer within {_NVIDIA_SMI_SECONDS} s"], {}
    if done.returncode:
        return 0, [f"nvidia-smi: {(done.stderr or done.stdout).strip()[-200:]}"], {}
    return read_gpus(done.stdout)


def read_gpus(text: str) -> tuple[int, list[str], dict[str, str]]:
    """What nvidia-smi's table says: number of GPUs, problems, and what has to be the same on all nodes."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    problems = []
    for number, (_, _, errors, slowed, hot) in enumerate(rows):
        if errors.isdecimal() and int(errors):
            problems.append(f"GPU {number} has {errors} uncorrected ECC errors: reset or replace it")
        if slowed == "Active" or hot == "Active":
            problems.append(f"GPU {number} is slowed down by its hardware ({'heat' if hot == 'Active' else 'power'})")
    names = ", ".join(sorted({row[0] for row in rows}))
    return len(rows), problems, {"GPU": names, "driver": ", ".join(sorted({row[1] for row in rows}))}


def _folder_problem(folder: Path, token: str) -> str:
    try:
        if (seen := _read(folder / "supervisor")) != token:
            return (
                f"{folder.parent} is not the folder that the supervisor sees ({'other' if seen else 'nothing'} there)"
            )
        _write_through(folder / node_name(), token)
    except OSError as error:
        return f"{folder.parent} cannot be written: {error.strerror}"
    return ""


def _write_through(path: Path, text: str) -> None:
    """Create, write, fsync, rename, fsync the folder: everything that a checkpoint asks of a file system."""
    beside = path.with_name(path.name + ".new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(beside, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _size_of(path: str) -> int:
    try:
        found = os.statvfs(path)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def _code_digest() -> str:
    """Of megagrok's own source: an edited copy on one node has the same version."""
    digest = hashlib.sha256()
    root = Path(megagrok.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
