"""How a setting is declared: once, with default, range, unit, meaning and reason.

The configurations of the stages and of a run, the file of defaults and the reference are made of these declarations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

V = TypeVar("V", bool, int, float, str)

# A dataclass with metadata, not pydantic: pydantic adds 0.12 s to the start of every command, which takes 0.25 s.


@dataclass(frozen=True)
class Setting:
    """What is known of a setting.

    Attributes
    ----------
    default : bool, int, float or str
        Its type is the type of the setting.
    reason : str
        Why the default is what it is, or what to know before changing it; may be empty.
    unit : str
        Empty for a number without a unit.
    low, high : float
        Smallest and largest number allowed; a number outside can only be a slip.
    choices : tuple of str
        Texts allowed; empty where any text is.
    """

    name: str
    default: Any
    meaning: str
    reason: str = ""
    unit: str = ""
    low: float = 0.0
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def type(self) -> type[bool] | type[int] | type[float] | type[str]:
        """Type of the setting."""
        return type(self.default)

    @property
    def allowed(self) -> str:
        """The values allowed, in words; empty where the type alone decides."""
        if self.type not in (int, float):
            return ", ".join(f'"{choice}"' for choice in self.choices)
        unit = f" {self.unit}" if self.unit else ""
        if math.isinf(self.high):
            return f"{self.low:.10g}{unit} or more"
        return f"{self.low:.10g} to {self.high:.10g}{unit}"

    def checked(self, value: object) -> Any:
        """The value, as a TOML file gives it, in the type of the setting; an integer is taken for a float.

        Raises
        ------
        ValueError
            If the value has another type or is not allowed.
        """
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type:
            raise ValueError(f"{self.name} is {value!r}, it must be of type {self.type.__name__}")
        if isinstance(value, int | float) and self.type is not bool:
            if not (self.low <= value <= self.high and math.isfinite(value)):
                raise ValueError(f"{self.name} is {value!r}, it must be between {self.low:.10g} and {self.high:.10g}")
        elif self.choices and value not in self.choices:
            raise ValueError(f"{self.name} is {value!r}, it must be one of {', '.join(self.choices)}")
        return value


def setting(default: V, meaning: str, reason: str = "", **more: Any) -> V:
    """A field of a configuration; see `Setting` for the parameters."""
    said = {"default": default, "meaning": meaning, "reason": reason, **more}
    return field(default=default, metadata=said)


def declared(kind: type) -> Iterator[Setting]:
    """The settings that a configuration declares, in its order."""
    return (Setting(f.name, **f.metadata) for f in dataclasses.fields(kind) if f.metadata)
