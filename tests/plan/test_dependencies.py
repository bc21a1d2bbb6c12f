"""Libraries that are known to be bad are named by their metadata, and nothing is imported to find out."""

import subprocess
import sys

import pytest

from megagrok.plan.dependencies import FIRST_GOOD, bad_dependencies, installed_versions


@pytest.mark.parametrize(
    ("version", "is_bad"),
    [
        ("2.9.1", True),
        ("2.9.1+cu128", True),
        ("2.10.0rc1", True),
        ("2.10.0a0+git1234", True),
        ("2.10.0.dev20260101", True),
        ("2.10", False),
        ("2.10.0", False),
        ("2.10.0+cpu", False),
        ("2.10.0.post1", False),
        ("2.13.0", False),
        ("10.0", False),
        ("unknown", True),
    ],
)
def test_a_version_is_older_as_pip_has_it(version: str, is_bad: bool) -> None:
    found = bad_dependencies({"torch": version, "numpy": "0.1"})
    assert found == [f"torch {version} < 2.10.0 ({FIRST_GOOD['torch'][1]})"] * is_bad


def test_installed_versions_are_read_without_importing() -> None:
    assert {"torch", "deepspeed", "megatron-core"} <= set(installed_versions())
    code = (
        "import sys; from megagrok.plan.dependencies import installed_versions; installed_versions(); "
        "print({'torch', 'deepspeed', 'megatron', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
