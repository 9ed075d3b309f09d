"""The wheel installs without a compiler and works alone; pins satisfy the requirements; imports are declared."""

import ast
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
SOURCES = {
    "eve_ds": {".py", ".yaml", ".json", ".typed"},
    "kernels": {".cpp", ".cu", ".cuh", ".h"},
    "ds_configs": {".json"},
}
"""Suffixes of the files that a wheel takes from each folder of the repository."""
DISTRIBUTIONS = {"PIL": "pillow", "markdown_it": "markdown-it-py", "skimage": "scikit-image", "yaml": "pyyaml"}
DISTRIBUTIONS |= {"megatron": "megatron-core"}
"""Distributions whose name differs from the name of their module."""


def run_python(code, site, *arguments, **environment):
    """Words that `code` prints where `site` precedes the editable install; -P leaves the folder out."""
    environment = os.environ | {"PYTHONPATH": str(site)} | environment
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Content of the wheel, built where no compiler is on the path."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    for name in (*SOURCES, "tests", "launcher"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    empty = folder / "bin"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, env=os.environ | {"PATH": str(empty)}, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def expected_files():
    for folder, suffixes in SOURCES.items():
        paths = (path.relative_to(REPOSITORY) for path in (REPOSITORY / folder).rglob("*") if path.suffix in suffixes)
        yield from (path if folder == "eve_ds" else "eve_ds" / path for path in paths if "bench" not in path.parts)


def test_wheel_holds_the_package_kernels_and_deepspeed_configurations_only(unpacked):
    files = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    metadata = {path for path in files if path.parts[0].endswith(".dist-info")}
    assert "LICENSE" in {path.name for path in metadata}
    assert files - metadata == set(expected_files())
    assert {"eve_tiny.yaml", "scenes_tokenizer.json", "routing.cuh", "zero1_bf16.json", "py.typed"} <= {
        path.name for path in files
    }
    assert not (unpacked / "eve_ds" / "kernels" / "__init__.py").exists()


def test_import_alone_is_light_and_works_from_the_wheel(unpacked):
    code = (
        "import sys, eve_ds; assert eve_ds.__version__; "
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules); "
        "from eve_ds.config import load_config; print(load_config('eve_tiny').name, eve_ds.__file__)"
    )
    assert run_python(code, unpacked) == ["eve_tiny", str(unpacked / "eve_ds" / "__init__.py")]


OPS_AND_MODEL = """
import sys
from importlib.resources import files
from pathlib import Path

import torch

from eve_ds import ops
from eve_ds.config import load_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import load
from eve_ds.export.start import draw_weights, write_start
from eve_ds.ops import build

assert ops.route_topk(torch.zeros(2, 4), top_k=1, capacity=-1).gates.shape == (2, 1)
config = load_config("eve_tiny")
weights, tokenizer = draw_weights(config), load_tokenizer(config.data.tokenizer)
origins = dict.fromkeys(weights, "drawn")
write_start(Path(sys.argv[1]), config, tokenizer, weights, source="drawn", origins=origins, notes=[])
model, _, _ = load(sys.argv[1])
assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
print(build.KERNELS, (files("eve_ds") / "ds_configs" / "zero1_bf16.json").is_file())
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the ops")
def test_ops_build_and_a_model_loads_from_the_wheel(unpacked, tmp_path):
    cache = tmp_path / "cache"
    found = run_python(OPS_AND_MODEL, unpacked, tmp_path / "model", EVE_DS_OPS="build", EVE_DS_CACHE=str(cache))
    assert found == [str(unpacked / "eve_ds" / "kernels"), "True"]
    assert list(cache.glob("eve_ds_cpu_*.so"))


UNTESTED = {"gs"}
"""Extras that no test installs: a stand-in takes the place of their packages."""


def test_pins_cover_and_satisfy_every_requirement_and_hold_no_cuda():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    extras = [text for name in groups.keys() - UNTESTED for text in groups[name]]
    for requirement in map(Requirement, project["dependencies"] + extras):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is required by pyproject.toml and not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is pinned, {requirement} is required"
    assert not [name for name in pins if name.startswith(("nvidia", "triton", "cuda"))]


def imported(folder):
    """Distributions that the files of a folder import, except the standard library and this repository's modules."""
    names = set()
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    files = list((REPOSITORY / folder).rglob("*.py"))
    own = {"eve_ds"} | {path.stem for path in files} | {path.parent.name for path in files}
    return {DISTRIBUTIONS.get(name, name) for name in names - own - set(sys.stdlib_module_names)}


def test_every_imported_distribution_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    runtime = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    extras = {
        name: {canonicalize_name(Requirement(text).name) for text in group}
        for name, group in project["optional-dependencies"].items()
    }
    development = extras.pop("dev")
    used = {canonicalize_name(name) for name in imported("eve_ds") | imported("launcher")}
    assert runtime <= used <= runtime.union(*extras.values())
    assert {canonicalize_name(name) for name in imported("tests")} <= runtime | development


def test_repository_root_is_not_importable():
    # transformers imports a package `kernels` where it finds one; ours holds sources only.
    assert importlib.util.find_spec("kernels") is None, "start `pytest`; `python -m pytest` puts the root on the path"
    assert importlib.util.find_spec("launcher") is None
