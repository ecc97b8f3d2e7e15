"""What every configuration section has: checks, help texts, and what a change means for a resume.

A section is a pydantic dataclass: field types and bounds are checked together when it is built, an
unknown name is refused, and the docstring below each field is its help text on the command line.
A field's type names its resume class: `learning_rate: Accepted[float] = 3e-4`.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")


class OnResume(Enum):
    """What happens when a run is resumed with another value of an option."""

    FREE = "free"
    """Changes nothing that is learnt, except by rounding."""
    ACCEPTED = "allowed with --accept-change"
    """Changes how the rest of the run is trained."""
    CONTENT = "allowed with --accept-change while what it names has the same content"
    """Names or filters data, weights or a tokenizer; every checkpoint holds their digests."""
    FORBIDDEN = "forbidden"
    """The resume position, the optimizer's moments or the weights would mean something else."""


Free = Annotated[T, OnResume.FREE]
Accepted = Annotated[T, OnResume.ACCEPTED]
SameContent = Annotated[T, OnResume.CONTENT]
Fixed = Annotated[T, OnResume.FORBIDDEN]


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def section(cls: type[T]) -> type[T]:
    """Return `cls` as a keyword-only pydantic dataclass that refuses unknown fields."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    made: Any = dataclass(kw_only=True, config=config)(cls)
    for base in made.__mro__[1:]:  # pydantic reads the help texts of the class itself alone
        for name, inherited in getattr(base, "__pydantic_fields__", {}).items():
            field = made.__pydantic_fields__[name]
            field.description = field.description or inherited.description
    return made


def resume_class(section: Any, field: str) -> OnResume:
    """Return the class of one field of a section; a field without one may not change."""
    marks = section.__pydantic_fields__[field].metadata
    return next((mark for mark in marks if isinstance(mark, OnResume)), OnResume.FORBIDDEN)
