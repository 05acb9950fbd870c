"""Values for JSON."""

from typing import Any

from pydantic_core import to_jsonable_python


def without_nan(value: Any) -> Any:
    """``value`` as plain JSON values, with None for NaN and infinities, which JSON lacks."""
    return to_jsonable_python(value, inf_nan_mode="null")
