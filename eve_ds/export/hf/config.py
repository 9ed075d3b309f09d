"""Configuration of the transformers model."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import PreTrainedConfig

from eve_ds.config import ModelConfig, parse_config

FORMER = ("objective",)
"""Names of fields in earlier versions, which :class:`eve_ds.config.ModelConfig` still reads."""


class EveConfig(PreTrainedConfig):  # noqa: PLW1641, mutable and unhashable like every config of transformers
    """Configuration with the fields and defaults of :class:`eve_ds.config.ModelConfig` as attributes.

    `moe` and `pixel_decoder` are dictionaries. Like every config of transformers, it keeps attributes of other names,
    such as `use_cache`, which its Trainer sets.

    Raises:
        ConfigError: a value breaks a rule, a dictionary has an unknown key, or a name misspells a field.
    """

    model_type = "eve"
    # transformers makes this class a dataclass, whose own comparison would ignore the fields.
    __eq__ = PreTrainedConfig.__eq__

    def __post_init__(self, **kwargs: Any) -> None:
        """Validate the fields; `kwargs` are arguments that are not attributes of every transformers config."""
        fields = {name: kwargs.pop(name) for name in list(kwargs) if _is_field(name)}
        super().__post_init__(**kwargs, **_validated(fields).model_dump(mode="json"))

    def to_model_config(self) -> ModelConfig:
        """Return the configuration for EVE.

        Raises:
            ConfigError: an attribute was set to a value that breaks a rule.
        """
        return _validated({name: getattr(self, name) for name in ModelConfig.model_fields})


def _is_field(name: str) -> bool:
    """Whether a name is a field of the model, or so close to one that it is a misspelling, which validation refuses."""
    known = [*ModelConfig.model_fields, *FORMER]
    if hasattr(PreTrainedConfig, name) or hasattr(PreTrainedConfig, f"_{name}"):
        return False
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=0.9))


def _validated(fields: dict[str, Any]) -> ModelConfig:
    return parse_config({"model": fields}, EveConfig.__name__).model
