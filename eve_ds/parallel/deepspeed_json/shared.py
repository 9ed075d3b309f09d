"""Settings that the DeepSpeed JSON and the YAML both know: the value that both agree on."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from eve_ds.config import Config
from eve_ds.config.section import Section
from eve_ds.parallel.deepspeed_json.check import JSON, Problems
from eve_ds.parallel.deepspeed_json.values import show


class SharedSettings:
    """The YAML's settings, into which the values of the JSON are taken.

    A value that only the JSON gives is taken. A value that both give must be equal.

    Args:
        config: settings of the YAML.
        problems: gets the contradictions.
    """

    def __init__(self, config: Config, problems: Problems) -> None:
        self.config, self.problems = config, problems
        self.taken: dict[tuple[str, str], tuple[str, Any]] = {}
        """(section, field) of the YAML -> path in the JSON, value."""

    def get(self, section: str, field: str) -> Any:
        """Value of a field: from the JSON if it gives one, else from the YAML."""
        own = getattr(getattr(self.config, section), field)
        return self.taken.get((section, field), ("", own))[1]

    def take(self, path: str, value: Any, section: str, field: str) -> None:
        """Take a value of the JSON for a field of the YAML, or add a problem.

        Args:
            path: place in the JSON.
            value: value of the right type.
            section, field: place in the YAML.
        """
        ours = getattr(self.config, section)
        own = getattr(ours, field)
        try:
            value = getattr(type(ours).model_validate({**ours.model_dump(), field: value}), field)
        except ValidationError as error:
            rule = error.errors()[0]["msg"].removeprefix("Value error, ")
            self.problems.add(path, f"{path} ({show(value)}) {JSON} cannot be {section}.{field}: {rule}")
            return
        if self.is_explicit(section, field) and own is not None and own != value:
            self.problems.add(path, contradiction(f"{section}.{field}", own, path, value))
            return
        other, earlier = self.taken.setdefault((section, field), (path, value))
        if earlier != value:
            self.problems.add(
                path, f"{path} ({show(value)}) contradicts {other} ({show(earlier)}) {JSON}: make them equal"
            )

    def is_explicit(self, section: str, field: str) -> bool:
        """Whether the YAML gives the field, so that the JSON must agree with it."""
        ours: Section = getattr(self.config, section)
        return field in ours.model_fields_set

    def settled(self, **of_section: dict[str, Any]) -> Config:
        """Return the configuration with all values that were taken, and with further values by section."""
        changes = {section: dict(values) for section, values in of_section.items()}
        for (section, field), (_, value) in self.taken.items():
            changes.setdefault(section, {}).setdefault(field, value)
        return self.config.model_copy(
            update={
                section: getattr(self.config, section).model_copy(update=values) for section, values in changes.items()
            }
        )


def contradiction(ours: str, our_value: Any, theirs: str, their_value: Any) -> str:
    """Return the message about a setting with different values in the two files."""
    return (
        f"{ours} ({_plain(our_value)}) in the YAML contradicts {theirs} ({_plain(their_value)}) {JSON}: "
        'set the JSON to "auto", or make them equal'
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else show(value)
