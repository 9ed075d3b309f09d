"""Every hostile file of the corpus ends in its line, quickly, in little memory, without programs and connections."""

import re

import pytest
from hostile import checkpoints, data, results, settings, tokenizers, weights
from hostile.contained import contained
from hostile.honest import write_honest

KINDS = {
    "checkpoints": checkpoints,
    "data": data,
    "results": results,
    "settings": settings,
    "tokenizers": tokenizers,
    "weights": weights,
}
CASES = {f"{kind}: {name}": case for kind, module in KINDS.items() for name, case in module.CASES.items()}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Folder with a run, its export and a fine-tuned model, for cases that damage a copy."""
    return write_honest(tmp_path_factory.mktemp("honest"))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_one_line(name, honest, tmp_path):
    case = CASES[name]
    (tmp_path / "files").mkdir()
    outcome = contained(lambda: case.run(tmp_path / "files", honest), tmp_path)
    shown = f"exit code {outcome.code}\n{outcome.output}"
    assert "Traceback" not in outcome.output, shown
    assert outcome.code == case.code, shown
    assert outcome.forbidden == "", outcome.forbidden
    lines = [line for line in outcome.output.split("\n") if re.search(case.line, line)]
    assert lines, shown
    assert max(map(len, lines)) < 1200
