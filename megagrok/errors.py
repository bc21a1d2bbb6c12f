"""What a user, a file, a cluster or a network can cause. Bugs of ours are plain assertions.

Every message says: the setting or place, the value seen, the rule it broke, the nearest values that work.
The exit code tells a scheduler whether a restart can help: 2-5 never requeue, 75 and 76 do, 70 is our bug.
"""

from typing import ClassVar

EXIT_BUG = 70
EXIT_TRANSIENT = 75
EXIT_PREEMPTED = 76
EXIT_UNREAD = 128 + 13
"""As a shell names the end by SIGPIPE: nobody reads the output any more."""


class MegagrokError(Exception):
    """Base of everything megagrok raises on purpose. `exit_code` is what the process ends with."""

    exit_code: ClassVar[int] = EXIT_BUG
    rank: int | None = None
    """The rank that failed first, where its launcher knows."""


class ConfigError(MegagrokError):
    """The configuration, or an override of it, cannot be run."""

    exit_code = 2


class TopologyError(ConfigError):
    """The ranks cannot be arranged as asked, or two libraries disagree on who is where."""


class DataError(MegagrokError):
    """A corpus, a tokenizer or a token file is missing, damaged or of another kind."""

    exit_code = 3


class CheckpointError(MegagrokError):
    """A checkpoint is missing, incomplete, damaged, or of another run or model."""

    exit_code = 4


class MachineError(MegagrokError):
    """The machine lacks something the run needs: a library, a device, space, a permission."""

    exit_code = 5


class ShapeError(MegagrokError):
    """A tensor does not have the shape its function needs."""


class KernelError(MegagrokError):
    """A kernel cannot take these shapes, this dtype or this device."""


class NonFiniteError(MegagrokError):
    """Loss or gradient is not finite. Raised on all ranks together, before weights move."""


class SpikeError(MegagrokError):
    """Loss or gradient norm is far above what it was. Raised on all ranks together, before weights move."""


class ReplicaError(MegagrokError):
    """Ranks that hold the same tensor hold different bits of it. A restart from the newest checkpoint cures it."""

    exit_code = EXIT_TRANSIENT


class RankError(MegagrokError):
    """A rank died or hung; carries the first failure of all ranks, not the echo of it."""

    exit_code = EXIT_TRANSIENT
    is_node_suspect = False
    """It was killed or hung, which its machine may have caused, and raised no error of its own."""
    stacks = ""
    """Python stacks of a node's ranks, if one of them hung."""


class RankBugError(RankError):
    """A rank raised what only a mistake in the code raises: it would do so again."""

    exit_code = EXIT_BUG
