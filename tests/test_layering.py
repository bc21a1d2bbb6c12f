"""The house stands as drawn: rooms import upward only, foreign libraries stop at their doors, no input is ever run.

Reads the source with ast, so that an import inside a function counts like any other; the last tests plant an offence of
each kind and see it found.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "errors", "whole_file", "config", "plan", "platform", "parallel", "kernels", "model", "data", "checkpoint",
    "engine", "telemetry", "train", "verify", "rehearse", "bench", "slurm", "drill", "lab", "specialise", "cli",
    "__main__",
)  # fmt: skip

PEERS = ("megagrok.bench.peers", "megagrok.kernels.peers")
# A foreign name, and the modules that may use it (a module covers those below it).
DOORS = {
    # The benches' peers are other users of these libraries, timed as such.
    "megatron": ("megagrok.parallel", "megagrok.model", "megagrok.engine", *PEERS),
    "deepspeed": ("megagrok.parallel", "megagrok.model.moe", "megagrok.engine", *PEERS),
    "transformers": PEERS,
    "transformer_engine": ("megagrok.model", "megagrok.kernels.peers"),
    "triton": ("megagrok.kernels",),
    "wandb": ("megagrok.telemetry",),
    "torch.cuda": ("megagrok.platform", "megagrok.parallel"),
    "os.environ": ("megagrok.parallel.launch", "megagrok.parallel.placement", "megagrok.slurm.environment"),
    "os.getenv": ("megagrok.parallel.launch", "megagrok.parallel.placement", "megagrok.slurm.environment"),
    "os.putenv": ("megagrok.parallel.launch", "megagrok.parallel.placement", "megagrok.slurm.environment"),
}
# They come with the container of a GPU machine, or are peers there. On a CPU, tests alone need triton.
PRESENT_ON_GPU_MACHINES = {"transformer_engine", "triton", "flash_attn", "liger_kernel", "sonicmoe"}
TORCH_FREE = ("megagrok", "megagrok.errors", "megagrok.config", "megagrok.plan", "megagrok.slurm")

FORBIDDEN_NAMES = (
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "torch.load", "torch.save", "torch.distributed.all_gather_object", "torch.distributed.gather_object",
    "torch.distributed.broadcast_object_list", "torch.distributed.scatter_object_list",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all",
    "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "runpy",
    "torch.hub", "torch.jit.load", "pandas.read_pickle", "jsonpickle",
)  # fmt: skip
FORBIDDEN_CALLS = ("eval", "exec", "__import__")
FORBIDDEN_TRUE = ("shell", "allow_pickle", "trust_remote_code")
# In a shell script: text that becomes a command.
FORBIDDEN_IN_SHELL = re.compile(
    r"(?:^|[\s;&|(`])(?:eval|(?:ba|da|z)?sh\s+-\w*c|(?:source|\.)\s+<\(|xargs\s+(?:ba)?sh)\b|\|\s*(?:ba)?sh\b"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file. `module` is its dotted name, or its path where it is no part of megagrok."""

    module: str
    tree: ast.Module
    is_package: bool


@dataclass(frozen=True, slots=True)
class Use:
    """A dotted name that a file imports or reaches through an import, e.g. torch.cuda from torch.cuda.is_available."""

    name: str
    line: int
    is_import: bool


def read(path: Path) -> Source:
    relative = path.relative_to(ROOT)
    # Linked as megagrok/kernels; its tests lie beside what they test and are no part of the house.
    is_kernel = relative.parts[0] == "kernels" and not re.match("test_|conftest", path.name)
    parts = ("megagrok", *relative.parts) if is_kernel else relative.parts
    module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(relative))
    return Source(module if parts[0] == "megagrok" else str(relative), tree, path.name == "__init__.py")


def repository() -> list[Path]:
    """Every Python file that git knows or could add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


SOURCES = [read(path) for path in repository()]
HOUSE = [source for source in SOURCES if source.module.split(".")[0] == "megagrok"]
MODULES = {source.module for source in HOUSE}


def uses(source: Source) -> Iterator[Use]:
    """All dotted names, with `import a.b as c` and `from a import b` written out in full."""
    names: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield Use(alias.name, node.lineno, True)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")[: None if source.is_package and node.level == 1 else -1]
                package = package[: len(package) - (node.level - 1)] if not source.is_package else package
                base = ".".join([*package, base]).removesuffix(".")
            for alias in node.names:
                names[alias.asname or alias.name] = f"{base}.{alias.name}"
                yield Use(f"{base}.{alias.name}", node.lineno, True)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and (dotted := dotted_name(node)):
            first, _, rest = dotted.partition(".")
            if first in names:
                yield Use(f"{names[first]}.{rest}", node.lineno, False)


def dotted_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value)):
        return f"{base}.{node.attr}"
    return None


def is_under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def own_imports(source: Source) -> Iterator[tuple[str, int]]:
    """The modules of this house that a file imports. `from megagrok.a import b` is a.b if that is a module, else a."""
    for use in uses(source):
        if use.is_import and is_under(use.name, ("megagrok",)):
            name = use.name.removesuffix(".*")
            yield (name if name in MODULES else name.rpartition(".")[0]), use.line


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def canonical(distribution: str) -> str:
    return re.sub("[-_.]+", "-", distribution).lower()


def imported_distributions(sources: list[Source]) -> set[str]:
    """What to install for the imports of `sources`, by name."""
    distributions = packages_distributions()
    tops = {use.name.split(".")[0] for source in sources for use in uses(source) if use.is_import}
    beside = {"tests", "benchmarks"}
    beside |= {path.stem for folder in tuple(beside) for path in (ROOT / folder).rglob("*.py")}
    foreign = tops - set(sys.stdlib_module_names) - {"megagrok"} - PRESENT_ON_GPU_MACHINES - beside
    return {canonical(name) for top in foreign for name in distributions.get(top, [f"{top} (not installed)"])}


def listed_distributions(*lists: str) -> set[str]:
    """The names in some lists of setup.py."""
    return {
        canonical(re.split("[=<>]", constant.value)[0])
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and dotted_name(node.targets[0]) in lists
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant)
    }


def downward_imports(source: Source) -> list[str]:
    here = room(source.module)
    if here is None:
        return [
            f"{source.module}:{line} imports {there}: the package itself imports nothing"
            for there, line in own_imports(source)
        ]
    found = []
    for there, line in own_imports(source):
        other = room(there)
        if other is not None and ROOMS.index(other) > ROOMS.index(here):
            found.append(f"{source.module}:{line} imports {there}: {here} stands above {other} and may not see it")
    return found


def strangers(source: Source) -> list[str]:
    found = []
    for use in uses(source):
        for name, doors in DOORS.items():
            if is_under(use.name, (name,)) and not is_under(source.module, doors):
                found.append(f"{source.module}:{use.line} uses {use.name}: only {', '.join(doors)} may")
        if is_under(use.name, ("torch",)) and is_under(source.module, TORCH_FREE[1:]):
            found.append(f"{source.module}:{use.line} uses {use.name}: this room starts without torch")
    return found


def dangers(source: Source) -> list[str]:
    found = [
        f"{source.module}:{use.line} uses {use.name}: what megagrok reads is never run"
        for use in uses(source)
        if is_under(use.name, FORBIDDEN_NAMES)
    ]
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{source.module}:{node.lineno} calls {node.func.id}: what megagrok reads is never run")
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_TRUE and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                found.append(f"{source.module}:{node.lineno} passes {keyword.arg}: what megagrok reads is never run")
    return found


def shell_scripts() -> list[Path]:
    """Every file that git knows or could add and that a shell would run: by its ending, its first line, or by make."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [path for line in listed.stdout.splitlines() if is_shell(path := ROOT / line)]


def is_shell(path: Path) -> bool:
    if path.suffix in (".sh", ".bash", ".sbatch") or path.name in ("Makefile", "Dockerfile"):
        return True
    if path.suffix or not path.is_file():
        return False
    with path.open("rb") as file:
        return re.match(rb"#!.*\b(?:ba|da|z)?sh\b", file.readline()) is not None


def shell_dangers(name: str, text: str) -> list[str]:
    return [
        f"{name}:{number} runs text as a command: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.lstrip().startswith("#") and FORBIDDEN_IN_SHELL.search(line)
    ]


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """One import cycle as the modules along it, or nothing."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(edges.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


def test_every_module_belongs_to_a_room_that_has_a_place_in_the_order() -> None:
    unplaced = sorted({module for module in MODULES if room(module) not in (None, *ROOMS)})
    assert not unplaced, f"say in tests/test_layering.py and CONTRIBUTING.md where these stand: {unplaced}"


@pytest.mark.parametrize("law", [downward_imports, strangers], ids=lambda law: law.__name__)
def test_no_module_of_the_house_breaks_the_import_rules(law) -> None:
    offences = dict.fromkeys(offence for source in HOUSE for offence in law(source))
    assert not offences, "\n".join(offences)


def test_every_folder_of_the_house_is_a_package_that_an_installation_takes_along() -> None:
    folders = {path.parent for path in repository() if path.is_relative_to(ROOT / "megagrok")}
    missing = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists())
    assert not missing, f"no __init__.py in {missing}"


def test_setup_lists_the_libraries_that_are_imported_and_no_others() -> None:
    imported, listed = imported_distributions(HOUSE), listed_distributions("CORE", "ENGINE", "PEERS") | {"torch"}
    assert imported == listed, f"not listed: {sorted(imported - listed)}; not imported: {sorted(listed - imported)}"


def test_setup_lists_what_the_tests_import() -> None:
    unlisted = (
        imported_distributions(SOURCES)
        - listed_distributions("CORE", "ENGINE", "PEERS", "DEV")
        - {"torch", "setuptools"}
    )
    assert not unlisted, f"not in setup.py: {sorted(unlisted)}"


def test_no_import_goes_round_in_a_circle() -> None:
    edges = {source.module: {there for there, _ in own_imports(source)} for source in HOUSE}
    assert not (found := cycle(edges)), " -> ".join(found)


def test_no_python_file_of_the_repository_runs_what_it_reads() -> None:
    offences = [offence for source in SOURCES for offence in dangers(source)]
    assert not offences, "\n".join(offences)


def test_no_shell_script_of_the_repository_runs_what_it_reads() -> None:
    scripts = shell_scripts()
    assert {"launch/train.sbatch", ".ci/run", "Makefile"} <= {str(path.relative_to(ROOT)) for path in scripts}
    offences = [offence for path in scripts for offence in shell_dangers(path.name, path.read_text(encoding="utf-8"))]
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("line", "is_dangerous"),
    [
        ('eval "$1"', True),
        ("  x=1; eval $x", True),
        ('bash -c "$1"', True),
        ("srun sh -ec run", True),
        ("curl https://x | sh", True),
        ("curl -s https://x|bash", True),
        ("source <(echo x)", True),
        ("echo $(eval echo $1)", True),
        ("# eval is not used here", False),
        ("make evaluate", False),
        ('exec megagrok slurm supervise "$@"', False),
        ("bash script.sh -c", False),
        ("./push | tee log", False),
    ],
)
def test_a_planted_danger_in_a_shell_script_is_found(line: str, is_dangerous: bool) -> None:
    assert bool(shell_dangers("x.sh", f"#!/bin/bash\n{line}\n")) == is_dangerous


def test_settings_and_plan_start_without_torch() -> None:
    modules = sorted(module for module in MODULES if is_under(module, TORCH_FREE[1:]))
    heavy = "torch", "numpy", "megatron", "deepspeed", "transformers", "datasets", "wandb"
    program = f"import sys, {', '.join(modules)}\nprint(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {', '.join(modules)} also imported {done.stdout.strip()}"


PLANTED = [
    (downward_imports, "megagrok.model.x", "from megagrok.train import schedule"),
    (downward_imports, "megagrok.config.x", "def late():\n    import megagrok.cli"),
    (downward_imports, "megagrok.data.x", "from ..engine import engine"),
    (strangers, "megagrok.train.x", "import megatron.core"),
    (strangers, "megagrok.data.x", "from megatron import core"),
    (strangers, "megagrok.model.x", "from deepspeed.moe import layer"),
    (strangers, "megagrok.bench.x", "import transformers"),
    (strangers, "megagrok.engine.x", "import torch\ntorch.cuda.is_available()"),
    (strangers, "megagrok.engine.x", "from torch import cuda as seam"),
    (strangers, "megagrok.telemetry.x", "import os\nkey = os.environ['KEY']"),
    (strangers, "megagrok.telemetry.x", "from os import environ"),
    (strangers, "megagrok.config.x", "import torch"),
    (dangers, "anywhere.py", "import pickle"),
    (dangers, "anywhere.py", "from torch import load"),
    (dangers, "anywhere.py", "import torch as t\nt.save(1, 'x')"),
    (dangers, "anywhere.py", "import torch.distributed as dist\ndist.all_gather_object([], 1)"),
    (dangers, "anywhere.py", "eval('1')"),
    (dangers, "anywhere.py", "exec('1')"),
    (dangers, "anywhere.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
    (dangers, "anywhere.py", "import yaml\nyaml.load('', Loader=yaml.SafeLoader)"),
    (dangers, "launch/x.py", "import runpy\nrunpy.run_path('x')"),
    (dangers, "anywhere.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
]  # fmt: skip


@pytest.mark.parametrize(("law", "module", "text"), PLANTED, ids=[text for _, _, text in PLANTED])
def test_a_planted_offence_is_found(law, module: str, text: str) -> None:
    assert law(Source(module, ast.parse(text), is_package=False))


def test_a_planted_circle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
