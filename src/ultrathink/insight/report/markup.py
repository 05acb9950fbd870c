"""Templates that escape all text, and numbers for people."""

from __future__ import annotations

import math
import time
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# A control character has no place in HTML; its picture shows that it was there.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
NOTHING = "\u2013"  # a dash, where there is no value


def environment() -> Environment:
    """The templates of this package; an undefined name is an error."""
    made = Environment(
        loader=PackageLoader("ultrathink.insight.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.filters |= {
        "thousands": "{:,}".format,
        "figure": figure,
        "signed": signed,
        "units": units,
        "percent": lambda share: f"{100 * share:.2f}%",
        "moment": moment,
        "plural": plural,
    }
    return made


def _shown(value: Any) -> Any:
    """A value as markup: text that HTML may hold, nothing for None."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else clean(str(value))


def clean(text: str) -> str:
    """``text`` without what HTML may not hold: control characters, lone surrogates."""
    shown = text.replace("\r\n", "\n").translate(_PICTURES)
    return shown.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def units(share: float) -> str:
    """A share of a plot's width or height in the plot's own units, of which there are 1000."""
    return f"{1000 * share:.1f}"


# -- figures ---------------------------------------------------------------------------------------


def figure(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits: ``1.774``, ``25,600``, ``3.0e-5``; a dash if none."""
    if value is None:
        return NOTHING
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        mantissa, _, power = f"{value:.{max(0, digits - 2)}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def short(value: float, digits: int = 4) -> str:
    """A number as ``figure`` has it, without zeros at the end: ``0.0015``, ``7.1``."""
    mantissa, e, power = figure(value, digits).partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}{e}{power}"


def signed(value: float, decimals: int) -> str:
    """A number with its sign, a real minus, to so many decimals."""
    text = f"{abs(value):,.{decimals}f}"
    if not text.strip("0.,"):
        return text
    return f"{'−' if value < 0 else '+'}{text}"  # noqa: RUF001


def moment(seconds: float) -> str:
    """A unix time as a date and a time here."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def plural(count: int, singular: str, many: str | None = None) -> str:
    """``1 alarm``, ``3 alarms``."""
    return f"{count:,} {singular if count == 1 else many or singular + 's'}"
