"""What `tests/test_architecture.py` asks of the source: who imports whom, what runs when imported.

Works on text alone (`ast`); nothing of the package is imported. Each rule is a function from
sources to sentences, one a violation, none when all is well. The table of layers is the test's.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = "modern_llm"
PICKLERS = {"_pickle", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PURE_AT_IMPORT = {
    *(
        "TypeVar",
        "ParamSpec",
        "NewType",
        "NamedTuple",
        "namedtuple",
        "MappingProxyType",
        "Path",
        "Struct",
    ),
    *(
        "dtype",
        "frozenset",
        "set",
        "dict",
        "tuple",
        "list",
        "range",
        "len",
        "int",
        "float",
        "max",
        "min",
        "sorted",
    ),
    *("compile", "getLogger", "field", "Field", "ConfigDict", "SettingsConfigDict"),
    *(
        "AfterValidator",
        "BeforeValidator",
        "StringConstraints",
        "partial",
        "attrgetter",
        "itemgetter",
    ),
    *("items", "keys", "values", "join", "split", "format", "auto"),
}
"""Calls that only make a value; so do classes of the project and functions that return one."""


class Import(NamedTuple):
    """One import of one module: `target` is the module or `module.name`, as far as it is known."""

    target: str
    line: int
    at_import: bool
    """Whether it happens when the importing module is imported, not inside a function."""


@dataclass(frozen=True)
class Source:
    """The text of one file, under its module name."""

    module: str
    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


@dataclass(frozen=True)
class Layer:
    """One row of the table: what a layer may import besides itself and the standard library."""

    project: frozenset[str] = frozenset()
    """Names of layers, or single modules relative to the package (`data.records`)."""
    third_party: frozenset[str] = frozenset()
    only_in: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Third-party modules that only the named modules of this layer may import."""


def read_package(root: Path) -> list[Source]:
    """Every Python file of the package below the repository root."""
    sources = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(module, str(relative), path.read_text(encoding="utf-8")))
    return sources


def imports(source: Source, known: Iterable[str] = ()) -> list[Import]:
    """Every import of `source`.

    `from a import b` is an import of `a.b` when that is a `known` module, else of `a`; of foreign
    packages it is always `a.b`.
    """
    known = set(known)
    found: list[Import] = []
    for node, at_import in _nodes(source.tree):
        for target in _targets(node, source):
            head, _, name = target.rpartition(".")
            if head.split(".")[0] == PACKAGE and target not in known and head in known:
                target = head
            found.append(Import(target, getattr(node, "lineno", 0), at_import))
    return found


def _nodes(tree: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether it runs at import time."""
    for child in ast.iter_child_nodes(tree):
        yield child, at_import
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, ast.If) and _is_guard(child.test):
            later = True
        yield from _nodes(child, at_import and not later)


def _targets(node: ast.AST, source: Source) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = source.module.split(".")
            parts = parts[: len(parts) - node.level + source.is_package]
            base = ".".join([*parts, base] if base else parts)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute) and _dotted(node) == "torch.distributed":
        return ["torch.distributed"]
    if (
        isinstance(node, ast.Call)
        and _called(node) in ("import_module", "__import__")
        and node.args
    ):
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) else ["(a computed name)"]
    return []


def _is_guard(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


def _dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _called(node: ast.Call) -> str:
    return _dotted(node.func).rpartition(".")[2] or getattr(node.func, "attr", "")


def layer_of(module: str, core: Iterable[str]) -> str:
    """The row that a module belongs to: its folder, but `training` is two and the verbs are one."""
    parts = module.split(".")[1:]
    if not parts:
        return "package"
    if parts[0] in ("cli", "__main__"):
        return "cli"
    if parts[0] == "training":
        inside = ".".join(parts[1:])
        return "core" if not inside or _is_in(inside, core) else "stages"
    return parts[0]


def _is_in(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def table_violations(
    sources: list[Source], table: Mapping[str, Layer], core: frozenset[str]
) -> list[str]:
    """Imports that the table does not allow."""
    found = []
    known = {source.module for source in sources}
    for source in sources:
        layer = layer_of(source.module, core)
        if layer not in table:
            found.append(f"{source.path}: layer {layer!r} has no row in the table; add one")
            continue
        for imported in imports(source, known):
            reason = _refusal(source, layer, imported, table[layer], core)
            if reason:
                found.append(
                    f"{source.path}:{imported.line}: {layer} imports {imported.target}: {reason}"
                )
    return found


def _refusal(
    source: Source, layer: str, imported: Import, row: Layer, core: frozenset[str]
) -> str | None:
    target = imported.target
    root = target.split(".")[0]
    if root == PACKAGE:
        other = layer_of(target, core)
        inside = target.removeprefix(f"{PACKAGE}.")
        if inside.startswith("training.train_") and layer == "stages":
            return "stages do not import a stage"
        if other == layer:
            return None
        if other not in row.project and not _is_in(inside, row.project):
            return f"not among {sorted(row.project) or 'nothing'}"
        return None
    if root in sys.stdlib_module_names:
        return None
    for name, modules in row.only_in.items():
        if target == name or target.startswith(f"{name}."):
            short = source.module.removeprefix(f"{PACKAGE}.")
            return None if short in modules else f"only in {sorted(modules)}"
    if target.startswith("torch.distributed"):
        root = "torch.distributed"
    return None if root in row.third_party else f"not among {sorted(row.third_party) or 'nothing'}"


def cycles(sources: list[Source]) -> list[str]:
    """Modules that import each other in a circle, imports inside functions included."""
    known = {source.module for source in sources}
    graph = {
        source.module: {
            found.target
            for found in imports(source, known)
            if found.target in known and found.target != source.module
        }
        for source in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def heavy_at_start(sources: list[Source], start: str, heavy: frozenset[str]) -> list[str]:
    """Chains of imports by which importing `start` pulls a heavy package in."""
    by_name = {source.module: source for source in sources}
    queue, seen, found = [(start,)], {start}, []
    while queue:
        chain = queue.pop(0)
        for imported in imports(by_name[chain[-1]], by_name):
            if not imported.at_import:
                continue
            if imported.target.split(".")[0] in heavy:
                found.append(" -> ".join([*chain, imported.target]))
            # A module runs the packages above it first.
            parts = imported.target.split(".")
            for module in (".".join(parts[: n + 1]) for n in range(len(parts))):
                if module in by_name and module not in seen:
                    seen.add(module)
                    queue.append((*chain, module))
    return found


def work_at_import(source: Source) -> list[str]:
    """Statements that do more, when the module is imported, than name things."""
    makers = PURE_AT_IMPORT | {
        node.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) or _returns_a_function(node)
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").startswith(PACKAGE)
        ):
            makers |= {
                alias.asname or alias.name for alias in node.names if alias.name[:1].isupper()
            }
    return [f"{source.path}:{line}: {what}" for line, what in _work(source.tree.body, makers)]


def _work(body: list[ast.stmt], makers: set[str]) -> Iterator[tuple[int, str]]:
    for node in body:
        if isinstance(
            node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.Pass)
        ):
            continue
        if isinstance(node, ast.If) and _is_guard(node.test):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.ClassDef):
            yield from _work(node.body, makers)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for call in _calls(node.value) if node.value else ():
                if _called(call) not in makers:
                    yield (
                        call.lineno,
                        f"calls {_called(call) or ast.unparse(call.func)} at import time",
                    )
        else:
            yield node.lineno, f"a {type(node).__name__} statement runs at import time"


def _calls(value: ast.AST) -> Iterator[ast.Call]:
    """Calls that happen when `value` is computed: what a lambda would call does not."""
    if isinstance(value, ast.Lambda):
        return
    if isinstance(value, ast.Call):
        yield value
    for child in ast.iter_child_nodes(value):
        yield from _calls(child)


def _returns_a_function(node: ast.AST) -> bool:
    """Whether all that a function does is to return one that it defines."""
    if not isinstance(node, ast.FunctionDef):
        return False
    *before, last = node.body
    inner = {statement.name for statement in before if isinstance(statement, ast.FunctionDef)}
    if not isinstance(last, ast.Return) or not all(
        isinstance(s, ast.FunctionDef)
        or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in before
    ):
        return False
    return isinstance(last.value, ast.Lambda) or (
        isinstance(last.value, ast.Name) and last.value.id in inner
    )


def sizes(source: Source, max_lines: int, max_function: int | None) -> list[str]:
    """A file or a function that is too long."""
    found = []
    lines = len(source.text.splitlines())
    if lines > max_lines:
        found.append(f"{source.path}: {lines} lines, at most {max_lines}")
    for node in ast.walk(source.tree) if max_function else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > max_function:
                place = f"{source.path}:{node.lineno}"
                found.append(f"{place}: {node.name} has {length} lines, at most {max_function}")
    return found


def unsafe_loading(source: Source) -> list[str]:
    """Ways to run code from a file: pickles, `torch.load`, code from the Hub."""
    found = []
    for imported in imports(source):
        # The error is needed to refuse what torch.load(weights_only=True) refuses.
        if imported.target == "pickle.UnpicklingError":
            continue
        if imported.target.split(".")[0] in PICKLERS:
            found.append(f"{source.path}:{imported.line}: imports {imported.target}")
        if imported.target == "torch.load":
            found.append(
                f"{source.path}:{imported.line}: write torch.load(...), so that it can be judged"
            )
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            if _dotted(node.func) == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{source.path}:{node.lineno}: torch.load without weights_only=True")
            for name in ("trust_remote_code", "allow_pickle"):
                if options.get(name, "False") != "False":
                    found.append(f"{source.path}:{node.lineno}: {name}={options[name]}")
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if named and ast.unparse(value) != "False":
                    found.append(
                        f"{source.path}:{node.lineno}: trust_remote_code: {ast.unparse(value)}"
                    )
    return found
