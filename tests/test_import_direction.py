"""Allowed imports between the parts of the package: one direction only, and few parts may import DeepSpeed."""

import ast
from pathlib import Path

import pytest

import eve_ds

PACKAGE = Path(eve_ds.__file__).parent
BASE = {"file_lock", "limits", "log", "printable", "reading", "resources", "storage"}
"""Small parts about files and text, which every part may import; of other parts, the log asks for the rank."""
MAY_IMPORT = {  # part: other parts of eve_ds
    **{part: set() for part in BASE},
    "log": {"distributed"},
    "config": set(),
    "launch_environment": set(),
    "signals": set(),
    "launcher_watch": {"signals"},
    "lost_ranks": set(),
    "distributed": set(),
    "process_group": {"launch_environment", "lost_ranks"},
    "together": {"config", "distributed"},
    "topology": set(),
    "views": set(),
    "ops": set(),
    "data": {"config", "distributed", "signals", "together", "views"},
    "model": {"config", "ops", "views"},
    "model/eve.py": {"objectives"},  # whose heads it holds; objectives know the other modules of model only
    "objectives": {"config", "ops", "views", "data", "model"},
    "parallel": {"config", "process_group", "topology", "launch_environment", "ops", "model", "objectives"},
    "checkpoint": {"config", "distributed", "topology", "model"},
    "export": {"checkpoint", "config", "data", "model", "objectives", "ops"},
    "tasks": {"config", "data", "distributed", "topology", "model", "objectives", "checkpoint", "export", "views"},
    "evaluation": {
        *("config", "distributed", "together", "topology", "ops", "data", "model", "objectives", "checkpoint"),
        "tasks",
    },
    "planner": {"config", "data", "model", "objectives", "ops", "parallel", "topology"},
    "report": {"config", "ops", "data", "model", "objectives", "evaluation", "views"},
    "training": {
        *("config", "distributed", "together", "topology", "ops", "data", "model", "objectives", "parallel"),
        *("checkpoint", "tasks", "evaluation", "report", "signals"),
    },
    "benchmark": {
        *("config", "ops", "data", "model", "objectives", "checkpoint", "parallel", "training", "report", "views"),
        "topology",
    },
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)  # and no part may import cli
ONLY_IN = {  # library: parts that may import it
    "deepspeed": {"parallel", "training", "checkpoint", "benchmark"},
    "megatron": {"parallel"},
    "torch.distributed": {
        *("distributed", "lost_ranks", "process_group", "together", "topology", "parallel", "training", "checkpoint"),
        "benchmark",
    },
    "launcher": set(),
}


def imported_names(file: Path) -> set[str]:
    """Names that a module imports when it runs; those under TYPE_CHECKING are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(node) for block in typing_only for node in ast.walk(block)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write eve_ds.... in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in MAY_IMPORT, f"eve_ds.{part} is a new part: add its allowed imports to the table in this file"
    allowed = MAY_IMPORT[part] | BASE | {part} | MAY_IMPORT.get(str(file.relative_to(PACKAGE)), set())
    for name in imported_names(file):
        assert part != "objectives" or not name.startswith("eve_ds.model.eve."), f"{file.name} must not import {name}"
        if name.startswith("eve_ds."):
            assert name.split(".")[1] in allowed, f"eve_ds.{part} must not import {name}"
        for library, parts in ONLY_IN.items():
            inside = name == library or name.startswith(f"{library}.")
            assert not inside or part in parts, f"eve_ds.{part} must not import {name}"
            if inside and library == "deepspeed" and part == "benchmark":
                assert file.name == "peers.py", f"{file.name} must not import {name}: only peers.py measures peers"
