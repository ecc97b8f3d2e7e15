"""The Jinja environment of `transformers` with checks of loops, calls and growth.

Loops and calls look at the clock; operators, functions, filters and captured text look at the size
of what they would make before they make it.
"""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modern_llm.data.encode.template_limits import (
    check_call,
    check_growth,
    check_pieces,
    limit,
)


class Generator(CodeGenerator):
    """Writes `a ~ b` as a call that is checked."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        """Write the code of one `~`."""
        emit = self.write  # lines of code, to no file
        emit("environment.joined((")
        for arg in node.nodes:
            self.visit(arg, frame)
            emit(", ")
        emit("))")


class Bounded(ImmutableSandboxedEnvironment):
    """The environment; an existing one becomes it."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])
    code_generator_class = Generator
    began: float
    ticks: int

    def tick(self) -> str:
        """Check the time limit, once per several calls."""
        self.ticks += 1
        if self.ticks % 64 == 0:
            limit(self.began)
        return ""

    def joined(self, values: tuple[Any, ...]) -> str:
        """Return values as one text."""
        return self.concat(str(value) for value in values)

    def concat(self, pieces: Any) -> str:  # type: ignore[override]
        """Return captured pieces as one text."""
        found = list(pieces)
        check_pieces(found)
        return "".join(found)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Check an operation, then do it."""
        check_growth(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **named: Any) -> Any:
        """Check a call, then make it."""
        self.tick()
        check_call(function, args, named)
        return super().call(context, function, *args, **named)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, and add a check of the time limit to every iteration of a loop."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            look = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(look).set_lineno(loop.lineno))
        return tree


def bounded(made: Any) -> Bounded:
    """Return a bounded environment with the extensions, filters and globals of another one."""
    environment = made.overlay()
    environment.__class__ = Bounded
    environment.shared = False
    environment.began, environment.ticks = 0.0, 0
    environment.globals = dict(made.globals)
    environment.filters = {name: _checked(filter_) for name, filter_ in made.filters.items()}
    return environment


def _checked(function: Any) -> Any:
    @functools.wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        check_call(function, args, named)
        return function(*args, **named)

    return checked
