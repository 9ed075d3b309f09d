"""The model of the tests: `eve_tiny` with a quarter of its width and half of its experts.

A test that needs another size changes that key only: `tiny_model(moe={"num_experts": 8})`.
"""

from __future__ import annotations

from typing import Any

from eve_ds.config import Config, ModelConfig, load_config

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "moe_layers": [1, 2],
    "moe": {"num_experts": 4},
    "pixel_decoder": {"kind": "cross", "num_layers": 1, "hidden_size": 24, "num_attention_heads": 4},
    "image_size": 64,
    "patch_size": 8,
    "vocab_size": 256,
    "text_positions": 40,
    "text_length": 24,
    "initializer_range": 0.08,
    "layer_scale_init": 1.0,
    "drop_path_rate": 0.0,
    "text_dropout": 0.0,
}
"""Section `model` of a configuration; complete without `eve_tiny`, whose values it repeats where they are the same."""


def tiny_tree(**changes: Any) -> dict[str, Any]:
    """Return the model with other values of some keys; a section keeps the keys that are not changed."""
    return MODEL | {
        key: MODEL[key] | value if isinstance(value, dict) and key in MODEL else value for key, value in changes.items()
    }


def tiny_model(**changes: Any) -> ModelConfig:
    """Return `tiny_tree(**changes)` as a checked section."""
    return ModelConfig.model_validate(tiny_tree(**changes))


def overrides(tree: dict[str, Any] | None = None, prefix: str = "model") -> list[str]:
    """Return the model as overrides of a preset, such as `model.moe.num_experts=4`."""
    lines = []
    for key, value in (MODEL if tree is None else tree).items():
        name = f"{prefix}.{key}"
        lines += overrides(value, name) if isinstance(value, dict) else [f"{name}={value}"]
    return lines


def tiny_config(*more: str) -> Config:
    """Return `eve_tiny` with this model and further overrides."""
    return load_config("eve_tiny", [*overrides(), *more])
