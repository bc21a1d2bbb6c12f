"""A trainer's launcher that trains nothing: it writes its page, waits, and ends as a scenario says. No torch.

The supervisor takes it for the Python of the nodes. Everything but `train` is passed on to the real one. The scenario
lies beside it: how the launchers of each start end, by number of the start and of the node.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIRST_STEP = 1


def main(arguments: list[str]) -> int:
    scenario = json.loads((HERE / "scenario.json").read_text(encoding="utf-8"))
    node = os.environ.get("SLURMD_NODENAME", "")
    if "train" not in arguments[:4]:
        if "preflight" in arguments and (limit := scenario.get("open_files", {}).get(node)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        os.execv(scenario["python"], [scenario["python"], *arguments])
    from megagrok.train.attempt import Ending, NodePage, RankState, write_page

    root, index = Path(scenario["root"]), int(os.environ["SLURM_NODEID"])
    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    generation = the_generation(root, index)
    plans: list[dict[str, Any]] = scenario["starts"]
    plan: dict[str, Any] = plans[min(generation, len(plans)) - 1].get(str(index), {})
    step = plan.get("step", FIRST_STEP)

    def page(ending: Ending | None) -> NodePage:
        return NodePage(
            generation=generation, node=index, num_nodes=int(os.environ["SLURM_NNODES"]), host=node,
            job=os.environ["SLURM_JOB_ID"], restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)), pid=os.getpid(),
            started_at=time.time(), at=time.time(), ending=ending,
            ranks=tuple(
                RankState(rank=rank, pid=1, phase="step", step=step, beats=1, age_seconds=0.1)
                for rank in (2 * index, 2 * index + 1)
            ),
        )  # fmt: skip

    write_page(root, page(None))
    print(f"start {generation} on {node}, {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", flush=True)
    if "die" in plan:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + plan.get("seconds", 0.2)
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)
    code = plan.get("code", 0)
    if received:
        # A save takes a moment, in which a second signal would be the end of it.
        time.sleep(1.0)
        code = 76 if len(received) == 1 else 75
    rank = plan.get("rank")
    ending = Ending(
        exit_code=code, at=time.time(), host=node, rank=rank, phase="step", step=step,
        error=None if code in (0, 76) else "SomeError", message=plan.get("message", ""), saved_step=plan.get("saved"),
        is_node_suspect=plan.get("suspect", False),
    )  # fmt: skip
    write_page(root, page(ending))
    return code


def the_generation(root: Path, index: int) -> int:
    """Node 0 counts; the others wait for its word about this very step."""
    mark = "-".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    path = root / f"step-{mark}"
    if index == 0:
        generation = 1 + len(list(root.glob("attempts/*")))
        (root / "attempts" / f"{generation:05d}").mkdir(parents=True)
        path.with_suffix(".new").write_text(str(generation), encoding="utf-8")
        path.with_suffix(".new").rename(path)
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, "node 0 does not count"
        time.sleep(0.02)
    return int(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
