"""What the libraries say in vain on a CPU is dropped, and nothing else."""

import subprocess
import sys
from pathlib import Path

SAYS = """
import logging, warnings
from megagrok.parallel.quiet import drop_vain_warnings_on_cpu
drop_vain_warnings_on_cpu()
import megagrok.engine.engine
logging.getLogger("DeepSpeed").warning("something else")
warnings.warn("Apex is here")
"""


def test_importing_the_engine_says_nothing_and_other_warnings_pass() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SAYS], cwd=root, capture_output=True, text=True, check=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(said) == 2, said
    assert any(line.endswith("something else") for line in said)
    assert any(line.endswith("UserWarning: Apex is here") for line in said)
