"""Which installed libraries are known to be bad, from their metadata: nothing is imported, so it works without them.

Not a resolver and not a scanner. Only libraries that a run loads, each with the first version that is not affected.
megagrok itself reads no pickle, so most of these need somebody else's file to do harm; they are warned about because
the same environment is used for more than megagrok.
"""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

FIRST_GOOD: Mapping[str, tuple[str, str]] = {
    "torch": ("2.10.0", "CVE-2026-24747: a file corrupts memory even with weights_only"),
    "transformers": ("5.3.0", "CVE-2026-4372: a model's configuration runs code without trust_remote_code"),
    "deepspeed": ("0.15.1", "CVE-2024-43497: command injection by a local user"),
    "megatron-core": ("0.17.1", "CVE-2026-65110: a checkpoint in its own format runs code"),
}
"""For each distribution the first version without the worst that is known, and what that is."""


def installed_versions() -> dict[str, str]:
    """Versions of those of FIRST_GOOD that are installed."""
    found = {}
    for name in FIRST_GOOD:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def bad_dependencies(installed: Mapping[str, str]) -> list[str]:
    """A sentence for each of `installed` that is older than it should be."""
    return [
        f"{name} {installed[name]} < {good} ({what})"
        for name, (good, what) in FIRST_GOOD.items()
        if name in installed and _order(installed[name]) < _order(good)
    ]


def _order(text: str) -> tuple[tuple[int, ...], bool]:
    """Sorts versions as pip does, as far as releases and what precedes them: 2.10.0rc1 < 2.10 = 2.10.0 = 2.10.0+cpu."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    if numbers is None:
        return (), False
    release = [int(part) for part in numbers[0].split(".")]
    while release and release[-1] == 0:
        release.pop()
    is_final = re.match(r"[._-]?(a|b|c|rc|alpha|beta|dev|pre)", text[numbers.end() :]) is None
    return tuple(release), is_final
