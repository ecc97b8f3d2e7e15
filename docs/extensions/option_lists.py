"""Sphinx directives that write the options from the classes that define them, at build time.

`{options} modern_llm.config:TrainingConfig train` lists every field of a section: type, default,
help text and resume class; `:without:` names a section whose fields it leaves out. `{commands}`
lists the verbs with their own options. Nothing is written to disk, so no page can be out of date.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from modern_llm.config.base import OnResume, resume_class

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
RESUME = {
    OnResume.FREE: "",
    OnResume.ACCEPTED: "`--accept-change`",
    OnResume.CONTENT: "`--accept-change`, same content",
    OnResume.FORBIDDEN: "forbidden",
}
COMMON = ("config", "json_output", "debug", "expect_world")
"""Options of every verb."""


def type_text(annotation: Any) -> str:
    """Return a type in words: `int | None` is a whole number, since null is the default then."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in inner if part is not type(None))
    if origin in (list, tuple):
        return f"list of {type_text(inner[0])}" if inner else "list"
    if origin is dict or annotation is dict:
        return "mapping"
    return WORDS.get(annotation) or ("path" if annotation.__name__ == "Path" else "section")


def default_text(field: Any) -> str:
    """Return `required`, `default X`, or nothing where null or an empty value is the default."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == [] or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, enum.Enum):
        value = value.value
    return f"default `{str(value).lower() if isinstance(value, bool) else value}`"


def facts(field: Any) -> str:
    """Return type and default of a field in one line."""
    return ", ".join(filter(None, (type_text(field.annotation), default_text(field))))


def named(path: str) -> Any:
    """Return the class at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


class OptionList(SphinxDirective):
    """Definition list of the options of one section."""

    required_arguments = 1
    optional_arguments = 1
    option_spec = {"without": str}

    def run(self) -> list[nodes.Node]:
        section, prefix = named(self.arguments[0]), ""
        if len(self.arguments) > 1:
            prefix = f"{self.arguments[1]}."
        other = self.options.get("without")
        known = named(other).__pydantic_fields__ if other else {}
        return [self.listed(self._rows(section, prefix, known))]

    def _rows(
        self, section: Any, prefix: str, known: dict[str, Any]
    ) -> Iterator[tuple[str, str, str]]:
        fields = section.__pydantic_fields__
        marked = any(isinstance(m, OnResume) for f in fields.values() for m in f.metadata)
        for name, field in fields.items():
            if name in known and known[name].annotation == field.annotation:
                continue
            about = facts(field)
            if marked and (resume := RESUME[resume_class(section, name)]):
                about += f" · resume: {resume}"
            yield prefix + name, about, field.description or ""

    def listed(self, rows: Iterator[tuple[str, str, str]]) -> nodes.definition_list:
        """Return (name, facts, help) as a definition list with an anchor for each name."""
        result = nodes.definition_list(classes=["options"])
        for name, about, text in rows:
            term = nodes.term("", "", nodes.literal(text=name))
            term += [nodes.Text(" ")] + self._inline(about)
            term["ids"] = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")]
            result += nodes.definition_list_item(
                "", term, nodes.definition("", *self.parse_text_to_nodes(text))
            )
        return result

    def _inline(self, text: str) -> list[nodes.Node]:
        paragraphs = self.parse_text_to_nodes(text)
        return list(paragraphs[0].children) if paragraphs else []


class CommandList(OptionList):
    """Every verb: what it does, an example, its own options."""

    required_arguments = 0
    optional_arguments = 0

    def run(self) -> list[nodes.Node]:
        from modern_llm.cli import VERBS

        result: list[nodes.Node] = []
        for verb, (settings, _) in VERBS.items():
            part = nodes.section(ids=[f"verb-{verb.replace(' ', '-')}"], names=[verb])
            part += nodes.title("", "", nodes.literal(text=f"modern-llm {verb}"))
            part += self.parse_text_to_nodes(" ".join((settings.__doc__ or "").split()))
            part += nodes.literal_block(settings.example, settings.example, language="bash")
            names = [name for name in settings.model_fields if name not in COMMON]
            sections = [n for n in names if n in ("train", "data", "dpo", "kto", "model", "lora")]
            own = [name for name in names if name not in sections or "train" not in names]
            if "train" in names:
                listed = ", ".join(f"[`{n}`](options.md#{n})" for n in sorted(sections))
                part += self.parse_text_to_nodes(f"Sections: {listed}.")
            if own:
                part += self.listed(self._own(settings, own))
            result.append(part)
        return result

    def _own(self, settings: Any, names: list[str]) -> Iterator[tuple[str, str, str]]:
        shortcuts = settings.model_config.get("cli_shortcuts") or {}
        for name in names:
            field = settings.model_fields[name]
            shown = shortcuts.get(name, name)
            yield f"--{shown}", facts(field), field.description or ""


def plain_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, result: Any
) -> tuple[str, str] | None:
    """Replace the signature of a configuration section, whose options have a page of their own."""
    if what in ("class", "dataclass") and hasattr(obj, "__pydantic_fields__"):
        return "(**options)", ""
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("options", OptionList)
    app.add_directive("commands", CommandList)
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True}
