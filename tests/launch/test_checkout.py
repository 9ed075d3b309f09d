"""A launcher runs the package beside it, from anywhere and in child processes, and hides no other package."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted(path.name for path in (ROOT / "launcher").glob("[!_]*.py"))
PROBE = """
import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor


def found() -> tuple[str, object, object]:
    import eve_ds.cli.terminal

    return (eve_ds.cli.terminal.__file__, *map(importlib.util.find_spec, ("kernels", "launcher")))


def main() -> int:
    method = sys.argv[1]
    context = None if method == "none" else multiprocessing.get_context(method)
    if context is None:
        print(*found())
        return 0
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        print(*pool.submit(found).result())
    return 0
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the folders that matter, in which `launcher/probe.py` prints what it imports."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launcher", folder / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "eve_ds" / "cli", folder / "eve_ds" / "cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "eve_ds" / "__init__.py", folder / "eve_ds")
    (folder / "kernels").mkdir()
    launcher = (folder / "launcher" / "report.py").read_text()
    (folder / "launcher" / "probe.py").write_text(launcher.replace('"report"', '"probe"'))
    (folder / "eve_ds" / "cli" / "probe.py").write_text(PROBE)
    return folder


@pytest.fixture
def other(tmp_path):
    """A folder with another package of the same name."""
    (tmp_path / "other" / "eve_ds").mkdir(parents=True)
    (tmp_path / "other" / "eve_ds" / "__init__.py").write_text("raise ImportError('the other package')")
    return tmp_path / "other"


def assert_finds_its_own(checkout, command, **environment):
    """The program that `command` starts in another folder finds the package of `checkout`, and no folder of it."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=checkout.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == [str(checkout / "eve_ds" / "cli" / "terminal.py"), "None", "None"], done.stderr


@pytest.mark.parametrize("method", ["none", *multiprocessing.get_all_start_methods()])
@pytest.mark.parametrize("paths", ["root", "launcher", "other", "none"])
def test_package_beside_the_launcher_runs(checkout, other, method, paths):
    path = {"root": checkout, "launcher": checkout / "launcher", "other": other, "none": ""}[paths]
    assert_finds_its_own(checkout, [checkout / "launcher" / "probe.py", method], PYTHONPATH=str(path))


@pytest.mark.parametrize("method", ["none", *multiprocessing.get_all_start_methods()])
@pytest.mark.parametrize("options", [["-P"], ["-I"], ["-I", "-S"]], ids=" ".join)
def test_options_of_python_do_not_matter(checkout, options, method):
    assert_finds_its_own(checkout, [*options, checkout / "launcher" / "probe.py", method])


@pytest.mark.parametrize("method", ["none", *multiprocessing.get_all_start_methods()])
def test_symlinked_launcher_runs_the_package_beside_the_file(checkout, tmp_path, method):
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "eve"
    link.symlink_to(checkout / "launcher" / "probe.py")
    assert_finds_its_own(checkout, [link, method])


def test_relative_entry_of_the_path_is_dropped_too(checkout):
    assert_finds_its_own(checkout, ["checkout/launcher/probe.py", "none"], PYTHONPATH="checkout")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_differ_in_the_command_only(name):
    """Each has a module with `main`; the rest is one text."""
    command = name.removesuffix(".py")
    text = (ROOT / "launcher" / name).read_text()
    assert (ROOT / "eve_ds" / "cli" / name).is_file()
    common = (ROOT / "launcher" / "report.py").read_text().split('"""')[2]
    assert text.split('"""')[2] == common.replace('"report"', f'"{command}"')
