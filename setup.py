"""How megagrok is installed. Versions that are known to work together are pinned in constraints-cpu.txt, not here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megagrok/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None, "megagrok/__init__.py has no __version__"

# megagrok/kernels is a link to kernels/, which lies at the top of the repository, where its readers look for it: a
# package called `kernels` would collide with another project's.
PACKAGES = find_packages(include=["megagrok", "megagrok.*"])

# What every machine needs: settings, plan, data, checkpoints, telemetry.
CORE = [
    "datasets>=3",
    "matplotlib>=3.9",
    "numpy>=1.26",
    "pyarrow>=18",
    "pyyaml>=6",
    "tokenizers>=0.21",
    "tqdm>=4.66",
    "wandb>=0.31",
    "xxhash>=3",
]

# The two libraries below are pinned: tests name their lines and signatures, so an upgrade is a change of its own.
ENGINE = ["megatron-core==0.16.1", "deepspeed==0.19.8"]

# What `megagrok bench compare` races us against besides; it says so where they are missing.
PEERS = ["transformers>=5"]

# What tests and checks need besides.
DEV = [
    "hypothesis>=6",
    "mypy>=1.15",
    "pre-commit>=4",
    "pytest-xdist>=3.6",
    "pytest>=8",
    "ruff>=0.12",
    "safetensors>=0.5",
    "scipy>=1.13",
    "triton>=3.4",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="megagrok",
    version=VERSION[1],
    description="Train Grok-2-class mixture-of-experts models on Megatron-core x DeepSpeed x Transformer Engine",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    install_requires=CORE,
    extras_require={
        "cpu": ["torch==2.13.0", *ENGINE],
        # For NVIDIA's PyTorch container, whose torch, Transformer Engine and Apex must stay as they are. Neither of the
        # last two is listed: transformer-engine would be rebuilt, and the apex of PyPI is another project's.
        # Python 3.12 there has newer Megatron-core; docs/why/megatron-versions.md says what was read of it.
        "gpu": ["torch>=2.8", "megatron-core>=0.16.1,<0.20", "deepspeed==0.19.8"],
        "peers": PEERS,
        "dev": [*DEV, *PEERS],
    },
    entry_points={"console_scripts": ["megagrok=megagrok.cli:main"]},
)
