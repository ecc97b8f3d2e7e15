"""Text for a terminal: controls and overrides of direction are shown, ordinary text is kept."""

from __future__ import annotations

import json
import logging
import unicodedata

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.config.printable import (
    PrintableFormatter,
    json_line,
    one_line,
    printable,
    printable_values,
)

ATTACKS = {
    "\x1b[2J\x1b]0;title\x07": "\\x1b[2J\\x1b]0;title\\x07",
    "safe\rforged": "safe\\x0dforged",
    "\x9b31m": "\\x9b31m",
    "abc\u202egnp.exe": "abc\\u202egnp.exe",
    "\u2066x\u2069": "\\u2066x\\u2069",
    "\ud800": "\\ud800",
    "pass\u200bword\u3164": "pass\\u200bword\\u3164",
    "\U000e0041": "\\U000e0041",
    "a\b\x7f\x00": "a\\x08\\x7f\\x00",
}


@pytest.mark.parametrize("text", ATTACKS)
def test_controls_are_shown(text):
    assert printable(text) == ATTACKS[text]
    assert printable_values({text: [text]}) == {ATTACKS[text]: [ATTACKS[text]]}
    assert json.loads(json_line({"a": text})) == {"a": text}
    assert printable(json_line(text)) == json_line(text)
    record = logging.LogRecord("a", logging.INFO, "f", 1, "row %s", (text,), None)
    assert PrintableFormatter("%(message)s").format(record) == f"row {ATTACKS[text]}"


def test_no_control_character_and_no_bidi_class_passes():
    directions = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    for number in range(0x110000):
        character = chr(number)
        unsafe = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        unsafe |= unicodedata.bidirectional(character) in directions
        if unsafe and character not in "\n\t":
            assert character not in printable(character), hex(number)


@pytest.mark.parametrize("text", ["a\n\tb", "日本\u3000語", "👩\u200d👧", "می\u200cخواهم", "é ×"])
def test_ordinary_text_is_kept(text):
    assert printable(text) == text


def test_one_line_has_no_line_breaks():
    assert one_line("a\n\u2028 b\r\nc\x1b") == "a b c\\x1b"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("x" * 201, "201 bytes"),
        ("é" * 101, "202 bytes"),
        ("a/b", "holds / or"),
        ("a\\b", "holds / or"),
        (".tmp-a", "begins with a dot"),
        ("..", "begins with a dot"),
        ("a\u200bb", "control character"),
        ("a\nb", "control character"),
        ("a\x1b[2J", "control character"),
        ("a\u202eb", "control character"),
        ("\ud800", "unicode"),
        ("", "at least 1"),
    ],
)
def test_a_run_name_that_is_no_file_name_is_refused_at_once(name, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        TrainingConfig(run_name=name, output_dir=tmp_path)


def test_a_run_name_of_the_longest_size_is_a_file_name(tmp_path):
    config = TrainingConfig(run_name="é" * 100, output_dir=tmp_path)
    (tmp_path / f".tmp-old-{config.run_name}_final-12345678").mkdir()
