"""Search of source text (`ast`) for waits and loops that the watchdog could take for a hang."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.imports import Source

ENCLOSING = frozenset({"quick", "phase"})
# Calls that mark progress or, in every loop of ours, are known to.
MARKS = frozenset(
    "tick mark check enter quick phase stop_here leave digest_file verified_manifest "
    "write_tensors".split()
)
# Calls that take long each time that a loop comes to them: bytes, files, tensors, forwards, saves.
PIECES = frozenset(
    "file_digest fsync all_gather GatheredParameters full_parameters backward make_moments".split()
)
# Meant on these objects alone: too common as names.
MEANT = {
    "update": ("digest", "content"),
    "run": ("task", "self._task"),
    "read": ("stored", "weights"),
}
# Work without a measure: never within a step or a forward, which have no time for it.
LONG = frozenset(
    "prepare freeze set_up_frozen set_up_policy load_model load_tokenizer inspect_checkpoint "
    "verified_manifest find_store prepare_tables export save_pretrained committed_folder "
    "write_report write_tensors store_init_configuration append digest_file remembered_digest "
    "compile_layers make_scorer".split()
)
# `prepare` of a task and `append` of a list are not these.
OF_OTHERS = {"prepare": ("runtime", "accelerator", "self.accelerator"),
             "append": ("log", "store", "self._metrics", "self._store")}  # fmt: skip
NOT_WATCHED = ("collective.begin", "collective.join", "collective.leave")
"""Collectives that begin without waiting, and those before and after a watchdog."""


def unmarked(source: Source) -> list[str]:
    """One sentence for each place that breaks a rule of the marks."""
    return [f"{source.path}:{line}: {what}" for line, what in _found(source.tree, None)]


def _found(node: ast.AST, within: str | None) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        within = None  # what encloses a definition does not enclose its calls
    if isinstance(node, ast.With):
        yield from _waits(node)
        for item in node.items:
            name = _heartbeat(item.context_expr)
            if name in ENCLOSING:
                within = name
                if not _is_text(item.context_expr):
                    yield node.lineno, f"heartbeat.{name} without a name: give the phase one"
            else:
                yield from _found(item.context_expr, within)
        for child in node.body:
            yield from _found(child, within)
        return
    if isinstance(node, ast.For | ast.While):
        yield from _loop(node, within)
    if isinstance(node, ast.Call):
        name = _heartbeat(node)
        if name in ENCLOSING:
            yield node.lineno, f"heartbeat.{name} outside a `with`: its phase would never end"
        if name == "enter" and within is not None:
            yield node.lineno, "heartbeat.enter within a phase: what follows would keep its limit"
        if within == "quick" and (long := _is_long(node)):
            yield node.lineno, f"{long}() within a step or a forward, which has no time for it"
    for child in ast.iter_child_nodes(node):
        yield from _found(child, within)


def _waits(node: ast.With) -> Iterator[tuple[int, str]]:
    calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
    names = [_name(call) for call in calls]
    for call, name in zip(calls, names, strict=True):
        point = call.args[0].value if name == "around" and _is_text(call) else ""
        known = str(point).startswith("collective.") and point not in NOT_WATCHED
        if known and "waiting" not in names:
            yield node.lineno, f"{point} without waiting(): others' time would be this one's speed"


def _loop(node: ast.For | ast.While, within: str | None) -> Iterator[tuple[int, str]]:
    calls = [n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Call)]
    pieces = [_name(call) for call in calls if _is_piece(call)]
    if pieces and not MARKS & {_name(call) for call in calls} and within != "quick":
        yield node.lineno, f"a loop over {pieces[0]}() without heartbeat.tick()"


def _is_piece(call: ast.Call) -> bool:
    name = _name(call)
    return name in PIECES or (name in MEANT and _of(call) in MEANT[name])


def _is_long(call: ast.Call) -> str | None:
    name = _name(call)
    if name in OF_OTHERS and _of(call) not in OF_OTHERS[name]:
        return None
    return name if name in LONG else None


def _heartbeat(node: ast.AST) -> str | None:
    """The name of a function of `heartbeat` that is called."""
    if isinstance(node, ast.Call) and _of(node) == "heartbeat":
        return _name(node)
    return None


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _of(call: ast.Call) -> str:
    return ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""


def _is_text(call: ast.Call) -> bool:
    if not call.args:
        return False
    first = call.args[0]
    return isinstance(first, ast.JoinedStr) or isinstance(getattr(first, "value", None), str)
