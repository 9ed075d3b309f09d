"""The paper's comparison: one optimiser step of masked signal modelling against contrastive and matching objectives.

All have the backbone, its weights and the batch in common, and pass over real tokens only. The ratio of two rows' times
is the ratio of their samples/s.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor, nn

from eve_ds.benchmark.harness import Absent, Measure, Run, count_gflop, interleave, measured
from eve_ds.benchmark.measures import REAL_TOKENS, Rows, device, is_quick
from eve_ds.config import Config, PixelDecoderConfig, load_config
from eve_ds.losses import Counts, pretraining_losses, total_loss
from eve_ds.model.eve import EVE

Inputs = dict[str, dict[str, Tensor]]
"""Arguments of `EVE.forward` by objective."""
BASELINES = ("itc_itm", "itc_itm_mlm")
BATCHES = {"eve_tiny": 32, "eve_base": 4}
MAE_DECODER = PixelDecoderConfig(kind="self", num_layers=8, hidden_size=512, num_attention_heads=16)
"""The usual decoder of masked autoencoders (He et al., 2022), as deep and wide as the paper's is taken to be."""


def objectives(seconds: float) -> Rows:
    """A training step (forward, backward, AdamW) of each objective on the same samples, captions of 12 tokens."""
    for preset, batch in BATCHES.items():
        if preset == "eve_base" and is_quick(seconds):
            yield Absent(f"objectives, {preset}", ", ".join(BASELINES), f"{preset} is left out by --quick")
            continue
        config = load_config(preset)
        decoders = [config.model.pixel_decoder] + ([MAE_DECODER] if preset == "eve_base" else [])
        yield compare_objectives(config, decoders, 8 if is_quick(seconds) else batch, seconds)


def compare_objectives(config: Config, decoders: list[PixelDecoderConfig], batch: int, seconds: float) -> list[Measure]:
    """Rows of masked signal modelling with each decoder against each baseline, all timed in turn."""
    all_sides = Objectives(config, decoders, batch)
    sides: dict[str, Run] = {name: partial(all_sides.step, name) for name in all_sides.models}
    gflop = {name: all_sides.count(name) for name in sides}
    times = interleave(sides, seconds)
    shape = f"batch {batch}, captions of {REAL_TOKENS} of {config.model.text_length}"
    rows = []
    for decoder in map(describe, decoders):
        for baseline in BASELINES:
            row = measured(
                f"msm, {config.name}, {decoder}", torch.float32, shape, baseline, times[decoder], times[baseline]
            )
            rows.append(row._replace(ours_gflop=gflop[decoder], peer_gflop=gflop[baseline]))
    return rows


def describe(decoder: PixelDecoderConfig) -> str:
    """A decoder in a few letters."""
    return f"{decoder.kind} {decoder.num_layers}x{decoder.hidden_size}"


class Objectives:
    """One backbone under the heads of every side, and one batch; `models` are named by decoder or baseline."""

    def __init__(self, config: Config, decoders: list[PixelDecoderConfig], batch: int) -> None:
        torch.manual_seed(0)
        self.config, self.batch = config, batch
        changes: dict[str, dict[str, object]] = {describe(decoder): {"pixel_decoder": decoder} for decoder in decoders}
        changes |= {baseline: {"objective": baseline} for baseline in BASELINES}
        with torch.device("meta"):
            self.models = {name: EVE(config.model.model_copy(update=change)) for name, change in changes.items()}
        backbone = next(iter(self.models.values())).backbone
        for model in self.models.values():
            model.backbone = backbone
        everything = nn.ModuleList(self.models.values()).to_empty(device=device()).train()
        _draw(everything)
        # One for all: it passes over what has no gradient, and moments of the backbone are held once.
        self.optimizer = torch.optim.AdamW(everything.parameters(), lr=1e-4, fused=True)
        self.inputs = _inputs(config, batch)

    def step(self, name: str) -> None:
        """One step of a side."""
        self._backward(name, self.inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self, name: str) -> float:
        """10^9 floating point operations of a step, by the plain torch ops on two samples, as all are alike."""
        before = os.environ.get("EVE_DS_OPS")
        os.environ["EVE_DS_OPS"] = "reference"
        two = _inputs(self.config, 2)
        gflop = count_gflop(partial(self._backward, name, two)) * self.batch / 2
        self.optimizer.zero_grad()
        if before is None:
            del os.environ["EVE_DS_OPS"]
        else:
            os.environ["EVE_DS_OPS"] = before
        return gflop

    def _backward(self, name: str, by_objective: Inputs) -> None:
        model = self.models[name]
        inputs = by_objective[model.config.objective]
        masked = inputs.get("masked_token_ids")
        terms = pretraining_losses(
            model(**inputs),
            pixel_values=inputs["pixel_values"],
            image_mask=None,
            masked_patch_ids=inputs.get("masked_patch_ids"),
            token_labels=None if masked is None else inputs["input_ids"].flatten()[masked],
            patch_size=self.config.model.patch_size,
            counts=Counts(1000.0, 100.0, 1000.0),
        )
        total_loss(terms, self.config.loss).backward()


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    """Any weights: drawing those of EVE-Base as training does takes a minute."""
    for parameter in module.parameters():
        parameter.uniform_(-0.03, 0.03)
    for child in module.modules():
        if isinstance(child, nn.LayerNorm):
            child.reset_parameters()


def _inputs(config: Config, size: int) -> Inputs:
    """Arguments of `EVE.forward` by objective: the same images and texts, half of the words masked where any are."""
    model, masking = config.model, config.masking
    masked = round(masking.patch_mask_ratio * model.num_patches)
    predicted = max(round(masking.predicted_patch_share * masked), 1)
    order = torch.stack([torch.randperm(model.num_patches) for _ in range(size)])
    length = model.text_length
    positions = torch.arange(size).unsqueeze(1) * length + torch.arange(1, 1 + REAL_TOKENS // 2)
    pairs = {
        "pixel_values": torch.randn(size, 3, model.image_size, model.image_size),
        "input_ids": torch.randint(5, model.vocab_size, (size, length)),
        "attention_mask": (torch.arange(length) < REAL_TOKENS).expand(size, -1).contiguous(),
    }
    words = {"masked_token_ids": positions.flatten()}
    patches = {
        "visible_patch_ids": order[:, masked:].sort().values,
        "masked_patch_ids": order[:, :predicted].sort().values,
    }
    by_objective = {
        "msm": pairs | words | patches,
        "itc_itm": pairs,
        "itc_itm_mlm": pairs | words | {"masked_input_ids": pairs["input_ids"]},
    }
    return {
        objective: {name: tensor.to(device()) for name, tensor in tensors.items()}
        for objective, tensors in by_objective.items()
    }
