"""The first 20 losses of eve_tiny with a fixed seed equal stored ones, so that a refactor cannot change them unnoticed.

One trace is of the preset, another of `joint` with the settings that eve_tiny used for it.
`python tests/training/test_loss_trace.py --write NAME` rewrites a trace; do that only if the numbers are meant to
change.

The last bits depend on the kernels that torch picks for a processor. On the processor model and torch version recorded
in the file the comparison is exact. Elsewhere it uses a tolerance that was measured when the file was written: how far
the same 20 steps move if every initial weight moves by one unit in its last place, the effect of another summation
order.
"""

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import warnings
from pathlib import Path

if __name__ == "__main__":  # under pytest, conftest.py sets them before torch is imported
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import pytest
import torch

FOLDER = Path(__file__).parent
TRACES = {
    "loss_trace": [],
    "loss_trace_joint": [
        *("model.objectives=[joint]", "masking.predicted_patch_share=0.5", "masking.text_to_image_share=0.25"),
        *("optimizer.warmup_steps=100", "optimizer.lr=0.002", "train.train_batch_size=64"),
        "model.pixel_target=normalized",
    ],
}
"""File name of a trace -> overrides of eve_tiny."""
STEPS = 20
TERMS = ("loss", "mim", "mlm", "load_balancing", "router_z", "lr")
FUSED = 1e-5
"""Maximum relative difference of a run with the built ops."""
SAFETY = 100
"""Factor of a tolerance: it multiplies the effect of one unit in the last place of the weights, or one of the loss."""


def machine():
    """Return the torch version and processor, which decide the last bits."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": model[1] if model else platform.machine(),
    }


def trace(name, nudge=False, ops="reference"):
    """Run `pretrain` on eve_tiny in one process at ZeRO 0; return the loss terms of each step, unrounded.

    Stored traces use the reference ops, since the built ops sum in another order.
    """
    from eve_ds.config import load_config
    from eve_ds.training import pretrain as pretraining
    from eve_ds.training import start

    os.environ["EVE_DS_OPS"] = ops

    def nudged_optimizer(model, *arguments):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
        return build(model, *arguments)

    torch.set_num_threads(1)
    build, has_evaluation = start.build_optimizer, pretraining.trains_on_scenes
    pretraining.trains_on_scenes = lambda config: (
        False
    )  # evaluation takes longer than the 20 steps and does not change them
    if nudge:
        start.build_optimizer = nudged_optimizer
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"train.max_steps={STEPS}", "train.metrics_every=1", f"train.output_dir={folder}/run"]
            pretraining.pretrain(
                load_config("eve_tiny", [*settings, "train.save_every_steps=null", *TRACES[name]]), None
            )
            lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    finally:
        start.build_optimizer, pretraining.trains_on_scenes = build, has_evaluation
    return [{term: record[term] for term in TERMS} for record in map(json.loads, lines) if record["kind"] == "train"]


def largest_difference(one, other):
    """Return the largest relative difference of any loss term, by step."""
    return [
        max(abs(first[term] - second[term]) / max(abs(first[term]), 1e-12) for term in TERMS)
        for first, second in zip(one, other, strict=True)
    ]


def write(name):
    steps = trace(name)
    if trace(name) != steps:
        raise SystemExit("two runs in the same process differ; nothing was written")
    moved = largest_difference(steps, trace(name, nudge=True))
    tolerance = [SAFETY * max(torch.finfo(torch.float32).eps, *moved[: step + 1]) for step in range(STEPS)]
    file = FOLDER / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**machine(), "tolerance": tolerance, "steps": steps}, indent=1) + "\n")
    print(
        f"{file}: {STEPS} steps, loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}, tolerance {tolerance[-1]:.1e}"
    )


def traces(rank, world_size, name):
    return trace(name), trace(name), trace(name, ops="build") if shutil.which("g++") else None


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", TRACES)
def test_losses_of_eve_tiny_equal_the_stored_trace(run_ranks, name):
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    ((found, again, fused),) = run_ranks(traces, 1, name, timeout=360)
    assert found == again, "two runs in one process must be equal to the last bit"
    if fused is not None:
        assert max(largest_difference(found, fused)) <= FUSED
    here = machine()
    different = {name: (stored[name], here[name]) for name in here if stored[name] != here[name]}
    if not different:
        assert found == stored["steps"], "numbers changed: see the docstring of this file"
        return
    warnings.warn(f"compared with a tolerance, since the file was written with another {different}", stacklevel=1)
    for step, (moved, tolerance) in enumerate(
        zip(largest_difference(stored["steps"], found), stored["tolerance"], strict=True), start=1
    ):
        assert moved <= tolerance, f"step {step}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", choices=TRACES, required=True, help="store this trace")
    write(parser.parse_args().write)
