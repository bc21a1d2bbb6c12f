"""How long a search takes: layouts that pass check, those priced, seconds, for the 286 B model on one core.

    python -m benchmarks.plan_speed

Not a test: a shared machine would make it fail. Seconds are of this process (CPU time), the least of three.
"""

import time
from pathlib import Path

from megagrok.config import load_config
from megagrok.plan.estimate import Machine
from megagrok.plan.gpus import find_gpu
from megagrok.plan.search import search

CONFIG = Path(__file__).parents[1] / "configs" / "run" / "pretrain-286b.yaml"
REPEATS = 3


def main() -> None:
    """Print a row for each number of GPUs."""
    run, gpu = load_config(CONFIG).config, find_gpu("h100")
    machine = Machine(gpu, 8, gpu.network_bandwidth)
    print(f"{'GPUs':>6} {'pass check':>10} {'memory':>8} {'time':>8} {'seconds':>8} {'per 50,000':>10}")
    for gpus in (64, 512, 1024, 4096, 16384):
        seconds = []
        for _ in range(REPEATS):
            start = time.process_time()
            found = search(run, gpus, machine, ["bf16"], top=10)
            seconds.append(time.process_time() - start)
        best, priced = min(seconds), found.fitting + found.too_large
        counts = f"{gpus:>6} {found.legal:>10,} {priced:>8,} {found.fitting:>8,}"
        print(f"{counts} {best:>8.1f} {best / found.legal * 5e4:>10.1f}")


if __name__ == "__main__":
    main()
