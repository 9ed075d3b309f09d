"""Check and time a machine with a GPU; the command line is `eve_ds/cli/gpu.py`."""

import runpy
from pathlib import Path

checkout = runpy.run_path(str(Path(__file__).resolve().with_name("_checkout.py")))

if __name__ == "__main__":
    checkout["run"]("gpu")
