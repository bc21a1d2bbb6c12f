"""The schema documents itself, and the tables of ranges speak of fields that exist."""

import ast
import subprocess
import sys
from pathlib import Path

from megagrok.config import checks
from megagrok.config.fields import all_settings, section_class, without_null

ROOT = Path(__file__).parents[2]
LEAVES = {key: setting for key, setting in all_settings().items() if section_class(setting.annotation) is None}
NAMES = {key.rpartition(".")[2] for key in LEAVES}


def test_every_field_of_the_schema_has_a_docstring() -> None:
    assert [key for key, setting in LEAVES.items() if not setting.doc] == []


def test_every_number_has_a_range() -> None:
    ranges = (checks.ABOVE_ZERO, checks.NOT_NEGATIVE, checks.BELOW_ONE, checks.BETWEEN)
    numbers = {key.rpartition(".")[2] for key, setting in LEAVES.items() if without_null(setting.annotation) is float}
    assert {name: sum(name in members for members in ranges) for name in numbers} == dict.fromkeys(numbers, 1)


def test_ranges_and_paths_name_fields_of_the_schema() -> None:
    tables = (checks.LEAST, checks.WHY_LEAST, checks.ABOVE_ZERO, checks.NOT_NEGATIVE, checks.BELOW_ONE, checks.PATHS)
    assert {name for table in (*tables, checks.BETWEEN) for name in table} <= NAMES


def test_a_name_has_the_same_range_wherever_it_stands() -> None:
    # The tables go by bare name, so two fields of one name have to mean the same kind of value.
    kinds: dict[str, set[str]] = {}
    for key, setting in LEAVES.items():
        kinds.setdefault(key.rpartition(".")[2], set()).add(str(without_null(setting.annotation)))
    assert {name for name, found in kinds.items() if len(found) > 1} <= {"kind"}


def test_config_plan_and_the_command_load_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, megagrok.cli, megagrok.config, megagrok.plan\n"
        "print(sorted({'torch', 'numpy', 'megatron', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_is_read_somewhere_outside_the_settings() -> None:
    rooms = [path for path in (ROOT / "megagrok").rglob("*.py") if "config" not in path.parts]
    read = {
        node.attr
        for path in rooms
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    unread = sorted(key for key in LEAVES if key.rpartition(".")[2] not in read)
    assert not unread, f"settings that nobody reads: {unread}"
