"""Host calls of one optimizer step of our engine, compared with DeepSpeed's own ZeRO optimizer.

A call is an operator that reaches the dispatcher, however little it computes. If the host needs longer for its calls
than the accelerator for its work, the number of calls determines the time of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eve_ds.benchmark.harness import Measure, measured
from eve_ds.benchmark.inputs import device
from eve_ds.benchmark.measures import Rows
from eve_ds.benchmark.peers import join_group_of_one, stock_engine
from eve_ds.config import Config, load_config
from eve_ds.data.batch import Batch
from eve_ds.data.pipeline import build_loader
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.objectives.pretraining import count
from eve_ds.objectives.registry import objectives_of
from eve_ds.parallel.engine import initialize_engine
from eve_ds.parallel.experts.moe_factory import moe_factory
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.topology import Topology
from eve_ds.training.nonfinite import poison_if_nonfinite
from eve_ds.training.optimizer import build_optimizer
from eve_ds.training.pretrain import Pretraining

BATCH = 2
"""Pairs per step: few, so that host calls dominate the time, not matrix products."""
ZERO_1 = {"zero_optimization": {"stage": 1, "contiguous_gradients": True, "reduce_scatter": True}}
"""Settings of ds_configs/zero1_bf16.json that differ from the defaults."""
PARTS = ("forward", "backward", "step")
"""Parts of an optimizer step; the forward part includes the losses."""


class CallCounter(TorchDispatchMode):
    """Context manager that counts operator calls, including those of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class EngineStep:
    """Engine with its own model that runs every step on the same batch."""

    def __init__(self, config: Config, ours: bool, zero: dict[str, Any] = ZERO_1) -> None:
        """Build the engine, with one micro-batch per step.

        Args:
            config: preset of the model and the batch.
            ours: True: our engine; False: the engine that `deepspeed.initialize` returns.
            zero: DeepSpeed settings.
        """
        join_group_of_one()
        torch.manual_seed(0)
        self.config, settings = resolve_deepspeed_config(zero, config, world_size=1)
        moe_cls = moe_factory(settings["zero_optimization"]["stage"], Topology.current())
        module = Pretraining(self.config).build_model(moe_cls, from_checkpoint=False)
        optimizer = build_optimizer(module.model, self.config, settings)
        initialize = initialize_engine if ours else stock_engine
        self.engine = initialize(module, optimizer, settings)
        batch = self._batch()
        self.counts = count(batch, self.config.model)
        self.batch = batch.to(self.engine.device)

    def _batch(self) -> Batch:
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        size = self.config.train.train_batch_size
        loader = build_loader(
            self.config, tokenizer, objectives_of(self.config.model), rank=0, world_size=1, micro_batch_size=size
        )
        batch = next(loader)
        loader.close()
        return batch

    def run(self, clock: Callable[[], float]) -> dict[str, float]:
        """Run one step and return the difference of the clock over each of `PARTS`."""
        marks = [clock()]
        output = self.engine(self.batch, self.counts)
        loss = poison_if_nonfinite(output.loss)
        marks.append(clock())
        self.engine.backward(loss)
        marks.append(clock())
        self.engine.step()
        marks.append(clock())
        return {part: after - before for part, before, after in zip(PARTS, marks, marks[1:], strict=False)}

    def count(self) -> dict[str, int]:
        """Run one step and return its number of calls by part."""
        with CallCounter() as counter:
            return {part: int(calls) for part, calls in self.run(lambda: counter.calls).items()}


def calls(seconds: float) -> Rows:
    """Calls and host time of a step of eve_tiny at ZeRO 1 in bf16, by part and in total."""
    yield compare_calls(step_config("eve_tiny", BATCH), seconds)


def step_config(preset: str, batch: int) -> Config:
    """Return a preset in bf16 on generated scenes, with one micro-batch of `batch` samples per step."""
    data = ("data.sources=[{kind: scenes, level: easy}]", "data.tokenizer=scenes", "data.num_workers=0")
    return load_config(preset, [f"train.train_batch_size={batch}", "train.precision=bf16", *data])


def compare_calls(config: Config, seconds: float) -> list[Measure]:
    """Compare both engines, timed alternately for about `seconds`, at least three rounds after a warm-up round."""
    sides = {name: EngineStep(config, ours=name == "ours") for name in ("ours", "deepspeed")}
    for side in sides.values():
        side.run(_host_milliseconds)
    counts = {name: _with_whole(side.count()) for name, side in sides.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(times["ours"]) < 3:
        for name, side in sides.items():
            times[name].append(_with_whole(side.run(_host_milliseconds)))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    shape = f"ZeRO 1, batch {config.train.train_batch_size}, {_num_tensors(sides['ours'])} weight tensors"
    dtype = next(sides["ours"].engine.module.parameters()).dtype
    return [
        measured(
            f"host of the engine, {config.name}, {part}",
            dtype,
            shape,
            "deepspeed's own optimizer",
            [spent[part] for spent in times["ours"]],
            [spent[part] for spent in times["deepspeed"]],
        )._replace(ours_calls=counts["ours"][part], peer_calls=counts["deepspeed"][part])
        for part in (*PARTS, "whole")
    ]


def _with_whole(of_parts: dict[str, Any]) -> dict[str, Any]:
    return {**of_parts, "whole": sum(of_parts.values())}


def _num_tensors(side: EngineStep) -> int:
    return len(list(side.engine.module.parameters()))


def _host_milliseconds() -> float:
    """Milliseconds of CPU time; with an accelerator of wall-clock time, because its driver uses other threads."""
    return (time.process_time() if device().type == "cpu" else time.perf_counter()) * 1e3
