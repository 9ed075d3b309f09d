"""Write shards of a data set; the command line is `eve_ds/cli/prepare.py`."""

import runpy
from pathlib import Path

checkout = runpy.run_path(str(Path(__file__).resolve().with_name("_checkout.py")))

if __name__ == "__main__":
    checkout["run"]("prepare")
