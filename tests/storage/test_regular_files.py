"""Only regular files are opened by name: pipes, sockets and devices are refused at once."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import pytest

from modern_llm.config.errors import ConfigError, UserError
from modern_llm.models.load import inspect_checkpoint, load_tokenizer
from modern_llm.storage.regular_files import check_regular, open_regular, read_bytes, read_text
from tests.helpers.text import make_checkpoint, make_tokenizer

PACKAGE = Path(__file__).resolve().parents[2] / "modern_llm"
FREE = ("demo/", "storage/regular_files.py")  # the demo reads only its own files


def special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)  # the length of a socket's path is limited
            try:
                server.bind(f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("read", [check_regular, open_regular, read_bytes, read_text])
def test_what_is_no_regular_file_is_refused(kind: str, read, tmp_path: Path):
    special(tmp_path / "x", kind)
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path / "x")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path: Path, monkeypatch):
    from modern_llm.storage import regular_files

    special(tmp_path / "x", "pipe")
    monkeypatch.setattr(regular_files, "check_regular", lambda _: None)
    with pytest.raises(OSError, match="a named pipe, not a regular file"):
        open_regular(tmp_path / "x")


def test_text_is_read_as_open_reads_it(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(path, encoding="utf-8-sig") == path.read_text("utf-8-sig") == "a\nb\nc\n"
    with open_regular(path) as file:
        assert file.read(3) == b"\xef\xbb\xbf" and not os.get_inheritable(file.fileno())


def test_a_checkpoint_with_a_pipe_in_it_is_refused(tmp_path: Path):
    names = [path.name for path in make_tokenizer(tmp_path / "names").iterdir()]
    for at, name in enumerate(["config.json", "model.safetensors", *names]):
        place = tmp_path / str(at)
        model = make_checkpoint(place / "model", make_tokenizer(place / "tokenizer"))
        special(model / name, "pipe")
        reason = "no config.json in it" if at == 0 else f"{name} is a named pipe, not a regular"
        with pytest.raises(UserError, match=reason):
            inspect_checkpoint(model)
            load_tokenizer(model)
    special(tmp_path / "weights.pt", "pipe")
    with pytest.raises(UserError, match=r"weights\.pt"):
        inspect_checkpoint(tmp_path / "weights.pt")


def test_a_configuration_that_is_a_pipe_is_refused(tmp_path: Path):
    from modern_llm.verbs.settings import _read_file

    special(tmp_path / "run.yaml", "pipe")
    with pytest.raises(ConfigError, match=r"run\.yaml: a named pipe, not a regular file"):
        _read_file(tmp_path / "run.yaml")


def opened(tree: ast.AST) -> list[int]:
    """Return the lines that open a file for reading in another way."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        reads = node.func.attr == "open" and "rb" in modes
        if reads or node.func.attr in ("read_text", "read_bytes"):
            found.append(node.lineno)
    return found


def test_everything_is_opened_through_the_helper():
    problems = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(FREE):
            found = opened(ast.parse(path.read_text(encoding="utf-8")))
            problems += [f"{name}:{line}" for line in found]
    assert not problems, problems
    assert opened(ast.parse("path.open('rb'); path.read_text(); file.read()")) == [1, 1]
