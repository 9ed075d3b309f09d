"""Run a command of the package in this checkout, even if another eve_ds is installed or on the path.

Each launcher loads this file by its path, so that `python -P`, a symlink to the launcher, and processes that `spawn`
or `forkserver` start (they run the launcher again, as `__mp_main__`) find it too.
"""

import gc
import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _load_package() -> None:
    """Load `eve_ds` from the checkout; its modules follow from there. A package that is loaded already stays."""
    # Python puts the folder of the script on the path, and a multi-node `deepspeed` the repository root, where the
    # folder `kernels` hides a package of that name that transformers looks for.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "launcher")]
    if "eve_ds" in sys.modules:
        return
    spec = PathFinder.find_spec("eve_ds", [str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["eve_ds"] = module
    spec.loader.exec_module(module)


def run(command: str) -> None:
    """Run `eve_ds.cli.COMMAND` with the arguments of this process, and exit with its code.

    A launcher ends the other ranks once the first has ended with another code than 0; this must not change theirs.
    """
    code = importlib.import_module(f"eve_ds.cli.{command}").main()
    importlib.import_module("eve_ds.signals").ignore_stop_signals()
    gc.freeze()  # the interpreter would search the objects of torch for cycles several times: a second of CPU time
    sys.exit(code)


_load_package()
