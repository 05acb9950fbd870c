"""What every section of the configuration shares: frozen, typed, and strict about its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ultrathink.core.durations import Duration
from ultrathink.core.registry import Registry


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


class PartConfig(Section):
    """The options of a part that a registry knows by ``type``."""

    type: str


class PartOf:
    """Marks a field whose ``type`` names a member of ``registry`` and decides its other keys.

    A bare name stands for the part with its defaults: ``optimizer: muon``.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def _validate(self, value: Any) -> PartConfig:
        if isinstance(value, PartConfig):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            raise ValueError(
                f"name the {self.registry.kind}, for example {{type: {self.registry.names()[0]}}}"
            )
        options = self.registry.entry(value["type"]).options
        assert options is not None, f"{value['type']} was registered without its options"
        part: PartConfig = options.model_validate(dict(value))
        return part

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda part: part.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        members = []
        for entry in self.registry:
            assert entry.options is not None
            member = entry.options.model_json_schema()
            member["properties"]["type"] = {"const": entry.name}
            members.append(member)
        return {"anyOf": [{"enum": self.registry.names()}, *members]}


def _parse_duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    if not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a length of training")
    return Duration.parse(value)


def _duration_to_plain(duration: Duration) -> int | float | str:
    text = str(duration)
    if duration.unit == "ratio":
        return float(text)
    return int(duration.value) if duration.unit == "steps" else text


DurationField = Annotated[
    Duration,
    BeforeValidator(_parse_duration),
    PlainSerializer(_duration_to_plain),
    WithJsonSchema({"type": ["integer", "number", "string"]}),
]


def off_means(name: str) -> BeforeValidator:
    """YAML reads ``off`` as false; both mean the mode called ``name``."""
    return BeforeValidator(lambda value: name if value is False else value)
