"""The package installs without a compiler, holds its data files, and its pins keep what pyproject.toml promises."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The built wheel's content, built where no compiler is on the path."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "eve_ds", source / "eve_ds", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    (source / "kernels").mkdir()
    (source / "kernels" / "op.py").touch()
    empty = folder / "bin"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, env=os.environ | {"PATH": str(empty)}, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_is_pure_python_with_presets_and_tokenizer(unpacked):
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    package = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "eve_ds").rglob("*")
        if path.suffix in {".py", ".yaml", ".json"}
    }
    assert {name for name in files if ".dist-info/" not in name} == package
    assert {"eve_ds/configs/eve_tiny.yaml", "eve_ds/data/synthetic/scenes_tokenizer.json"} <= package


def test_import_alone_is_light_and_works_from_the_wheel(unpacked):
    code = (
        "import sys, eve_ds; assert eve_ds.__version__; "
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules); "
        "from eve_ds.config import load_config; print(load_config('eve_tiny').name, eve_ds.__file__)"
    )
    # -P: not from the current folder; the environment's editable install comes after PYTHONPATH.
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["eve_tiny", str(unpacked / "eve_ds" / "__init__.py")]


def test_pins_cover_and_satisfy_every_requirement_and_hold_no_cuda():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, project["dependencies"] + extras):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is required by pyproject.toml and not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is pinned, {requirement} is required"
    assert not [name for name in pins if name.startswith(("nvidia", "triton", "cuda"))]


def test_repository_root_is_not_importable():
    # transformers imports a package `kernels` where it finds one; ours holds sources only.
    assert importlib.util.find_spec("kernels") is None, "start `pytest`; `python -m pytest` puts the root on the path"
    assert importlib.util.find_spec("launcher") is None
