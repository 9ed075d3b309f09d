"""One rank of the `run_ranks` fixture: load a function from its file, run it in a gloo group, and save its result."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from eve_ds.process_group import leave_process_group


def main() -> None:
    file, name, folder, timeout = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(float(timeout), exit=True)
    sys.path.remove(str(Path(__file__).parent))  # no test file may shadow an installed module
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    arguments = pickle.loads((Path(folder) / "arguments.pickle").read_bytes())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=float(timeout)),
    )
    result = getattr(module, name)(rank, world_size, *arguments)
    (Path(folder) / f"result{rank}.pickle").write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.barrier()  # no rank may leave while another is inside a collective
    leave_process_group()
    gc.freeze()  # the interpreter would search the objects of torch for cycles several times: a second of CPU time


if __name__ == "__main__":
    main()
