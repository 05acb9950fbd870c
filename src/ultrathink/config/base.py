"""What every section of the configuration shares: frozen, typed, and strict about its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ultrathink.core.durations import Duration
from ultrathink.core.registry import Registry


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors, values never change."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        for field in cls.model_fields.values():
            if field.description:  # the string below it, on one line
                field.description = " ".join(field.description.split())
        return handler(source)

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """The value that YAML means where pydantic would read another, or none."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        kinds = _kinds(field.annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            kind = "int_type" if int in kinds else "float_type"  # and not 0 or 1
            raise PydanticCustomError(kind, "a truth value is not a number")
        if value is None and any(isinstance(k, type) and issubclass(k, Section) for k in kinds):
            if type(None) in kinds:
                return None
            value = {}  # a section whose keys are all commented out
        if isinstance(value, Mapping) and isinstance(field.default, PartConfig):
            return {"type": field.default.type, **value}
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for member in get_args(annotation) for kind in _kinds(member)}
    return {annotation}


class PartConfig(Section):
    """The options of a part that a registry knows by ``type``."""

    type: str


class PartOf:
    """Marks a field whose ``type`` names a member of ``registry`` and decides its other keys.

    A bare name stands for the part with its defaults: ``optimizer: muon``. ``short`` reads other
    text: it gives the keys that it stands for, or raises ConfigError.
    """

    def __init__(
        self, registry: Registry[Any], short: Callable[[str], dict[str, str]] | None = None
    ) -> None:
        self.registry = registry
        self._short = short

    def _validate(self, value: Any) -> PartConfig:
        if isinstance(value, PartConfig):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            raise ValueError(
                f"name the {self.registry.kind}, for example {{type: {self.registry.names()[0]}}}"
            )
        if self._short is not None and value["type"] not in self.registry:
            value = {**value, **self._short(value["type"])}
        options = self.registry.entry(value["type"]).options
        if options is None:
            raise ValueError(
                f"{self.registry.kind} {value['type']!r} was registered without a class for its "
                f"options; register it with options=YourConfig, a subclass of PartConfig"
            )
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
            if entry.options is not None:
                member = handler(entry.options.__pydantic_core_schema__)
                handler.resolve_ref_schema(member)["properties"]["type"] = {"const": entry.name}
                members.append(member)
        texts = [] if self._short is None else [{"type": "string"}]
        return {"anyOf": [{"enum": self.registry.names()}, *texts, *members]}


def _parse_duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    return Duration.parse(value if isinstance(value, int | float | str) else str(value))


def _duration_to_plain(duration: Duration) -> int | float | str:
    if duration.unit == "ratio":
        return float(duration.value)
    return int(duration.value) if duration.unit == "steps" else str(duration)


DurationField = Annotated[
    Duration,
    BeforeValidator(_parse_duration),
    PlainSerializer(_duration_to_plain),
    WithJsonSchema({"type": ["integer", "number", "string"]}),
]


def one_of(registry: Registry[Any], *others: str) -> AfterValidator:
    """A name that ``registry`` knows, or one of ``others``."""

    def check(name: str) -> str:
        if name not in others:
            registry.entry(name)
        return name

    return AfterValidator(check)


def alike(names: Sequence[str | None]) -> str | None:
    """The first name, in order, that is given twice."""
    twice = sorted({name for name in names if name is not None and names.count(name) > 1})
    return twice[0] if twice else None


def off_means(name: str) -> BeforeValidator:
    """YAML reads ``off`` as false; both mean the mode called ``name``."""
    return BeforeValidator(lambda value: name if value is False else value)


def no_truth_values(layers: Any) -> Any:
    """``layers`` unchanged; ValueError if one of a list is ``true``, which would be layer 1."""
    for layer in layers if isinstance(layers, list | tuple) else ():
        if isinstance(layer, bool):
            raise ValueError(f"{layer} is no layer; write an index (3) or a fraction (0.5)")
    return layers
