"""Search of source text (`ast`) for writes, renames and collectives outside fault points."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.imports import Source

# Calls that change a disk, by the last part of their name.
WRITES = frozenset(
    "write writelines write_text write_bytes fsync rename link hardlink_to symlink symlink_to "
    "copyfile copytree save_file save_pretrained save_model write_adapters tofile".split()
)
# Too common as names: meant only on these objects.
MEANT = {"replace": ("os",), "save": ("torch", "np", "numpy"), "copy": ("shutil",),
         "move": ("shutil",), "dump": ("json", "yaml", "pickle"), "truncate": ("os",)}  # fmt: skip
COLLECTIVES = frozenset(
    "all_reduce all_gather all_gather_object all_gather_into_tensor broadcast reduce gather send "
    "recv broadcast_object_list scatter reduce_scatter barrier monitored_barrier "
    "init_process_group".split()
)
WRITING = frozenset("wax+")


def points(source: Source) -> list[tuple[str, int]]:
    """Every fault point named in `source`, with its line."""
    return [
        (item.context_expr.args[0].value, node.lineno)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.With)
        for item in node.items
        if _is_point(item.context_expr)
    ]


def unguarded(source: Source, exempt: frozenset[str] = frozenset()) -> list[str]:
    """One sentence for each write, flush, rename or collective that no `with around` encloses.

    Args:
        exempt: functions (`module:name`) whose callers enclose them; their names count as writes.
    """
    return [
        f"{source.path}:{line}: {what} outside a fault point: enclose it in `with around(...)`"
        for line, what in _found(source.tree, source.module, exempt, inside=False)
    ]


def _found(
    node: ast.AST, module: str, exempt: frozenset[str], inside: bool
) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if f"{module}:{node.name}" in exempt:
            return
        inside = False  # what encloses a definition does not enclose its calls
    if isinstance(node, ast.With):
        for item in node.items:  # in order: an item is enclosed by those before it
            inside = inside or _is_point(item.context_expr)
            yield from _found(item.context_expr, module, exempt, inside)
        for child in node.body:
            yield from _found(child, module, exempt, inside)
        return
    if isinstance(node, ast.Call) and not inside and (what := _what(node)):
        yield node.lineno, what
    for child in ast.iter_child_nodes(node):
        yield from _found(child, module, exempt, inside)


def _is_point(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "around"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
    )


def _what(call: ast.Call) -> str | None:
    """Name what a call does, where it is one of those that need a point."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    base = call.func.value if isinstance(call.func, ast.Attribute) else None
    of = base.id if isinstance(base, ast.Name) else ""
    if name in WRITES and (base is not None or name != "write"):  # `write` alone: a local name
        return f"{name}()"
    if name in MEANT and (of in MEANT[name] or (name == "replace" and _is_rename(call, of))):
        return f"{name}()"
    if name in COLLECTIVES and of in ("dist", "distributed") or name == "wait_for_everyone":
        return f"collective {name}()"
    if name in ("open", "fdopen") and WRITING & set(_mode(call, method=base is not None)):
        return f"{name}() for writing"
    return None


def _is_rename(call: ast.Call, of: str) -> bool:
    """`path.replace(other)` has one argument; `text.replace(a, b)` two, `replace(record, ...)`
    names."""
    return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords


def _mode(call: ast.Call, method: bool) -> str:
    """The mode of `open(path, mode)` or `path.open(mode)`; empty for reading and for `os.open`."""
    named = [k.value for k in call.keywords if k.arg == "mode"]
    place = 0 if method else 1
    given = named or call.args[place : place + 1]
    value = given[0] if given else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
