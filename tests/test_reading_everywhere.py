"""Files of JSON are parsed by eve_ds.reading, so that depth, digits, size and kind of every file are bounded."""

import ast
from pathlib import Path

import pytest

import eve_ds

PACKAGE = Path(eve_ds.__file__).parent
IN_MEMORY = {
    "reading.py": "parses for all others",
    "data/tokenizer.py": "what a trainer of this process returned",
    "data/shard_writer.py": "what json.dumps of this process returned",
    "tasks/batches.py": "what pickle.dumps of this process returned",
    "parallel/settings.py": "what json.dumps of this process returned",
    "parallel/deepspeed_json/file.py": "the DeepSpeed JSON, with stricter rules for numbers and keys",
}
"""File -> text that it parses with the module json."""
PARSERS = {("json", "load"), ("json", "loads"), ("yaml", "safe_load"), ("yaml", "load"), ("pickle", "load")}
PARSERS |= {("pickle", "loads"), ("marshal", "loads"), ("shelve", "open"), ("ast", "literal_eval")}


def calls(file):
    """Line -> (module, function) of each call of that form."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=function)):
                yield node.lineno, (module, function)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_is_parsed_without_bounds(file):
    name = str(file.relative_to(PACKAGE))
    found = [f"{name}:{line}" for line, call in calls(file) if call in PARSERS]
    assert not found or name in IN_MEMORY, f"{found}: call eve_ds.reading"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_lines_of_data_end_with_a_line_feed_only(file):
    """str.splitlines also splits at U+2028 and others; output of programs and messages may be split by it."""
    name = str(file.relative_to(PACKAGE))
    found = [
        f"{name}:{node.lineno}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    of_programs = {"ops/build.py", "cli/demo_steps.py", "cli/gpu.py", "benchmark/harness.py"}
    of_bytes = {"data/formats/nlvr.py"}  # bytes.splitlines knows only the ends of lines of ASCII
    assert not found or name in of_programs | of_bytes, f"{found}: call eve_ds.reading.read_lines"
