"""The decorator `section`: typed, keyword-only, self-checking configuration classes.

A section is a pydantic dataclass: field types and bounds are checked together when it is built, an
unknown name is refused, and the docstring below each field is its help text on the command line.
"""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")
SECTIONS: list[Any] = []
"""All sections that were defined, for who looks one up by its options."""


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """Return `cls` as a keyword-only pydantic dataclass that refuses unknown fields."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    made = dataclass(kw_only=True, config=config)(cls)
    SECTIONS.append(made)
    return made
