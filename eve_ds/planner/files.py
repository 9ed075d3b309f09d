"""Files of `ds_configs/` by shape, and the sizes of buffers that they set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eve_ds.planner.shape import Shape
from eve_ds.reading import read_json

FILES = {
    "fp32": {(0, False): "zero0", (1, False): "zero1_ep2_cpu", (3, False): "zero3_cpu"},
    "bf16": {
        **{(0, False): "zero0", (1, False): "zero1_bf16", (2, False): "zero2_bf16"},
        **{(2, True): "zero2_offload", (3, False): "zero3_bf16"},
    },
}
"""Precision -> (ZeRO stage, offload) -> name of the file in `ds_configs/`."""
PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = (PACKAGE if (PACKAGE / "ds_configs").is_dir() else PACKAGE.parent) / "ds_configs"
"""Files of DeepSpeed: inside the package if it was installed from a wheel, beside the package in a checkout."""


def file_of(shape: Shape) -> Path:
    """File of the DeepSpeed JSON for a shape."""
    return FOLDER / f"{FILES[shape.precision][shape.zero_stage, shape.offload]}.json"


def with_buffers(shape: Shape) -> Shape:
    """The shape with the sizes of buffers that its file sets."""
    zero = read_json(file_of(shape))["zero_optimization"]
    given = {key: value for key, value in zero.items() if value != "auto"}
    return replace(
        shape,
        reduce_bucket=int(given.get("reduce_bucket_size", shape.reduce_bucket)),
        overlap_comm=given.get("overlap_comm", shape.overlap_comm),
        max_live_parameters=int(given.get("stage3_max_live_parameters", shape.max_live_parameters)),
    )
