"""Files of unknown origin: limits of size, depth, time and growth, and only regular files."""

from __future__ import annotations

import os
import time
import tracemalloc

import pytest
import yaml

from modern_llm.config.errors import ConfigError
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.untrusted import (
    MOST_NODES,
    finite,
    json_lines,
    parse_json,
    parse_yaml,
    whole_number,
)
from modern_llm.verbs.settings import sections_of

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
)
MERGES = "m0: &m0 {k: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 20)
)
BOMBS = {
    "aliases": (LAUGHS, "once its aliases are followed"),
    "merges": (MERGES, "once its aliases are followed"),
    "keys": ("a: &a [1]\nb: &b {? *a : 1}\nc: &c [*c]\n", "alias to what it is part of"),
    "itself": ("a: &a {b: *a}\n", "alias to what it is part of"),
    "flow depth": ("a: " + "[" * 5000, "levels"),
    "block depth": ("".join(f"{' ' * n}a:\n" for n in range(500)), "levels"),
    "values": ("a: [" + "1," * (MOST_NODES + 1) + "]", "values"),
    "base 60": ("a: " + ":".join(["1"] * 100_000), "digits"),
    "digits": ("a: " + "9" * 100_000, "digits"),
    "object": ("a: !!python/object/apply:os.system [true]\n", "constructor"),
    "no truth": ("a: !!bool x\n", "cannot be read"),
    "no time": ("a: !!timestamp x\n", "cannot be read"),
    "no number": ("a: !!int ''\n", "cannot be read"),
    "date": ("a: 2020-99-99\n", "cannot be read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_a_configuration_is_one_line_within_seconds(name, tmp_path):
    text, part = BOMBS[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=part) as raised:
        sections_of(path)
    assert time.monotonic() - began < 20
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_aliases_and_merges_of_people_are_read():
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    value, root = parse_yaml(text)
    assert value == yaml.safe_load(text) and root is not None
    assert parse_yaml("")[0] is None


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_text(tmp_path / "link") == "a"
    for name, follow, part in (
        ("fifo", True, "a named pipe"),
        ("link", False, "symbolic link"),
        (".", True, "directory"),
    ):
        with pytest.raises(OSError, match=part):
            read_text(tmp_path / name, follow=follow)
    with pytest.raises(OSError, match="not a regular file"):
        read_text("/dev/zero")
    with pytest.raises(ValueError, match="more than 10 bytes"):
        (tmp_path / "file").write_text("a" * 11)
        read_text(tmp_path / "file", 10)
    with pytest.raises(ConfigError, match="not a regular file"):
        sections_of(tmp_path / "fifo")


def test_a_configuration_from_a_pipe_of_the_shell_is_read():
    reading, writing = os.pipe()
    os.write(writing, b"train: {}\n")
    os.close(writing)
    assert sections_of(f"/dev/fd/{reading}") == ["train"]
    os.close(reading)


def test_damaged_lines_are_null_and_the_rest_is_read(tmp_path):
    lines = [b'{"step": 1}', b"[" * 200_000, b"\xff\x00", b'{"a": NaN}', b"9" * 5000, b'{"b": 2}']
    (tmp_path / "f").write_bytes(b"\n".join([*lines, b" " * 2_500_000, b'{"c": 3}', b'{"cut"']))
    assert [value for _, value in json_lines(tmp_path / "f")] == [
        {"step": 1}, None, None, {"a": None}, None, {"b": 2}, None, {"c": 3},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="deeply"):
        parse_json("[" * 200_000)


@pytest.mark.parametrize("depth", [100, 500, 900])
def test_json_that_is_parsed_and_could_not_be_written_is_refused(depth, tmp_path):
    text = '{"step": 1, "a": ' + "[" * depth + "]" * depth + "}"
    with pytest.raises(ValueError, match="deeply"):
        parse_json(text)
    (tmp_path / "f").write_text(text + "\n")
    assert [value for _, value in json_lines(tmp_path / "f")] == [None]
    assert parse_json("[" * 20 + "]" * 20) and parse_json("7") == 7


def test_numbers_of_a_file_are_numbers():
    assert [finite(v) for v in (1, 2.5, True, "1", None, 10**400, float("nan"), [1])] == [
        1.0, 2.5, None, None, None, None, None, None,
    ]  # fmt: skip
    assert [whole_number(v) for v in (3, 3.0, 2.5, -1, "3", True)] == [3, 3, None, None, None, None]


def test_a_huge_file_of_lines_is_refused_at_once_and_a_sparse_one_takes_no_memory(tmp_path):
    path = tmp_path / "f"
    path.write_text('{"step": 1}\n')
    os.truncate(path, 2**40)
    with pytest.raises(OSError, match=r"has more than 1,000,000,000 bytes"):
        next(json_lines(path))
    os.truncate(path, 300_000_000)
    tracemalloc.start()
    assert [value for _, value in json_lines(path)] == [{"step": 1}]
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
