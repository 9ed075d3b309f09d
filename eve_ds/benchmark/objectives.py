"""Comparison of EVE Table 1: one optimizer step of the objective of the paper and of variants with `itc` and `itm`.

All variants share the backbone, its weights and the pairs, and compute real tokens only. The ratio of the times of two
rows is the ratio of their samples/s.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from eve_ds.benchmark.harness import Absent, Measure, Run, count_gflop, interleave, is_quick, measured, peak_megabytes
from eve_ds.benchmark.inputs import REAL_TOKENS, Inputs, backward, device, draw_weights, random_inputs, reference_ops
from eve_ds.benchmark.measures import Rows
from eve_ds.config import Config, MaskingConfig, Objective, load_config
from eve_ds.model.eve import EVE

PAPER = MaskingConfig()
CHEAP = MaskingConfig(language_view_patch_share=0.5, predicted_patch_share=0.25)
"""Masking with half of the patches in the language view (FLIP) and a quarter of the masked patches predicted
(CrossMAE)."""
CHEAPER = {
    "language_view_patch_share": 0.5,
    "predicted_patch_share": 0.25,
    "image_view_share": 0.5,
    "image_view_word_share": 0.5,
}
"""Values of :class:`eve_ds.config.MaskingConfig` that are timed one at a time."""
BATCHES = {"eve_tiny": 32, "eve_base": 2}
"""Preset -> pairs per step."""
FEW_PAIRS = 2
"""Pairs of the smaller of the two batches that memory is measured with."""


class Side(NamedTuple):
    """One variant of pre-training."""

    objectives: list[Objective]
    masking: MaskingConfig = PAPER
    pack_views: bool = True


OURS = {
    "mim + mlm": Side(["mim", "mlm"]),
    "mim + mlm, cheap": Side(["mim", "mlm"], CHEAP),
}
PEERS = {
    "mlm + itc + mim": Side(["mim", "mlm", "itc"]),
    "mlm + itc + itm": Side(["mlm", "itc", "itm"]),
    "mlm + itc + itm + mim": Side(["mim", "mlm", "itc", "itm"]),
    "itc + itm": Side(["itc", "itm"]),
    "joint": Side(["joint"]),
    "mim + mlm, a pass each": Side(["mim", "mlm"], pack_views=False),
} | {
    f"mim + mlm, {name} {share:g}": Side(["mim", "mlm"], MaskingConfig.model_validate({name: share}))
    for name, share in CHEAPER.items()
}
"""The first three are in Table 1 of the paper. Its fourth variant, with tokens of another model as targets of `mim`, is
not implemented. The last ones have one cheaper mask each."""


def objectives(seconds: float) -> Rows:
    """Time a training step (forward, backward, AdamW) of each variant on the same pairs with captions of 12 tokens."""
    for preset, batch in BATCHES.items():
        if preset == "eve_base" and is_quick(seconds):
            yield Absent(f"objectives, {preset}", ", ".join(PEERS), f"{preset} is left out by --quick")
            continue
        yield compare_objectives(load_config(preset), 8 if is_quick(seconds) else batch, seconds)


def compare_objectives(config: Config, batch: int, seconds: float) -> list[Measure]:
    """Compare the objective of the paper, with its masks and cheaper ones, with every other variant."""
    sets = Objectives(config, batch)
    runs: dict[str, Run] = {name: partial(sets.step, name) for name in sets.models}
    gflop = {name: sets.count(name) for name in runs}
    memory = {name: sets.megabytes(name) for name in runs}
    times = interleave(runs, seconds)
    decoder = config.model.pixel_decoder
    shape = (
        f"batch {batch}, captions of {REAL_TOKENS} of {config.model.text_length}, "
        f"decoder {decoder.kind} {decoder.num_layers}x{decoder.hidden_size}, MB a pair"
    )
    return [
        measured(f"{ours}, {config.name}", torch.float32, shape, peer, times[ours], times[peer])._replace(
            ours_gflop=gflop[ours], peer_gflop=gflop[peer], ours_mb=memory[ours], peer_mb=memory[peer]
        )
        for ours in OURS
        for peer in PEERS
    ]


class Objectives:
    """One backbone shared by the heads of all variants, and one batch; `models` has the keys of OURS and PEERS."""

    def __init__(self, config: Config, batch: int) -> None:
        torch.manual_seed(0)
        self.config, self.batch, self.sides = config, batch, OURS | PEERS
        with torch.device("meta"):
            self.models = {
                name: EVE(config.model.model_copy(update={"objectives": side.objectives}))
                for name, side in self.sides.items()
            }
        backbone = next(iter(self.models.values())).backbone
        for name, model in self.models.items():
            model.backbone, model.pack_views = backbone, self.sides[name].pack_views
        everything = nn.ModuleList(self.models.values()).to_empty(device=device()).train()
        draw_weights(everything)
        # One optimizer for all variants: it skips parameters without a gradient and holds moments of the backbone once.
        self.optimizer = torch.optim.AdamW(everything.parameters(), lr=1e-4, fused=True)
        self.inputs = self._batches(batch)

    def step(self, name: str) -> None:
        """Run one training step of a variant."""
        backward(self.models[name], self.config, self.inputs[name])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self, name: str) -> float:
        """Return 10^9 floating-point operations of a step, extrapolated from two pairs with plain torch ops."""
        with reference_ops():
            gflop = count_gflop(partial(self._gradients, name, self._batches(FEW_PAIRS)[name]))
        return gflop * self.batch / FEW_PAIRS

    def megabytes(self, name: str) -> float | None:
        """Return the MB that one more pair adds to the peak of forward and backward, without weights and gradients.

        Gradients exist before the measurement; otherwise the peak of few pairs would be at the end of the backward
        pass, when all gradients exist.
        """
        more, fewer = FEW_PAIRS + self.batch, FEW_PAIRS
        peaks = [
            peak_megabytes(partial(self._gradients, name, self._batches(size)[name], keep=True))
            for size in (more, fewer)
        ]
        self.optimizer.zero_grad()
        return None if peaks[0] is None or peaks[1] is None else (peaks[0] - peaks[1]) / (more - fewer)

    def _batches(self, size: int) -> dict[str, Inputs]:
        return {name: random_inputs(self.config, side.masking, size) for name, side in self.sides.items()}

    def _gradients(self, name: str, inputs: Inputs, keep: bool = False) -> None:
        backward(self.models[name], self.config, inputs)
        self.optimizer.zero_grad(set_to_none=not keep)
