"""Words that may stand in a job script or beside `sbatch` and `srun`: a short alphabet, no spaces, no leading dash.

Nothing here quotes or escapes. The one idea: what needs no quoting cannot be quoted wrongly, so text from a file or a
command line is either a word or refused. (A newline would begin a directive of its own, a leading dash an option.)
"""

import re

from megagrok.config.problems import is_secret, shown

_WORD = re.compile(r"[A-Za-z0-9._/@:%+,=-]{1,256}")
# enroot separates the registry from the image by a #. It reaches srun's argument list, never a script.
_IMAGE = re.compile(r"[A-Za-z0-9._/@:%+,=#-]{1,256}")
_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
# Set by the supervisor or the launcher for each attempt, or by Slurm itself.
_OWNED = re.compile(r"MASTER_ADDR|MASTER_PORT|RANK|LOCAL_RANK|WORLD_SIZE|SLURM_\w*|SBATCH_\w*|SRUN_\w*|LD_PRELOAD|PATH")
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")


def word_problem(what: str, value: str) -> str | None:
    """Why `value` is no word; None if it is one. A value that looks like a secret is not repeated."""
    return _problem(what, value, _WORD, "letters, digits and . _ / @ : % + , = -")


def image_problem(what: str, value: str) -> str | None:
    """As `word_problem`, for the name of a container image."""
    return _problem(what, value, _IMAGE, "letters, digits and . _ / @ : % + , = # -")


def variable_problem(what: str, name: str, value: str) -> str | None:
    """Why a cluster file may not set the variable; None if it may."""
    if not _NAME.fullmatch(name):
        return f"{what}: {shown(name)} is no name of a variable, needs A-Z, 0-9 and _"
    if _SECRET_NAME.search(name):
        return f"{what}.{name} looks like a secret: set it in the environment that submits, jobs inherit it"
    if _OWNED.fullmatch(name):
        return f"{what}.{name} is set by Slurm or by megagrok for each attempt, a cluster file may not"
    return word_problem(f"{what}.{name}", value)


def _problem(what: str, value: str, pattern: re.Pattern[str], alphabet: str) -> str | None:
    if is_secret(value):
        return f"{what} looks like a secret: keep it in the environment, job scripts and logs are read by others"
    if value.startswith("-"):
        return f"{what} = {shown(value)}: begins with a dash, which Slurm would read as an option"
    if not pattern.fullmatch(value):
        return f"{what} = {shown(value)}, needs 1 to 256 of {alphabet}: it becomes part of a job script"
    return None
