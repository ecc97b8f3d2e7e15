"""The help of a verb: required options and an example first, 80 columns, no blank entry."""

from __future__ import annotations

import re
import shlex

import pytest

from modern_llm.cli import VERBS, main
from modern_llm.verbs.command_line import read_words
from modern_llm.verbs.stage_settings import OFTEN


@pytest.mark.parametrize("words", [["--help"], ["--help", "all"]], ids=len)
@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_its_reader(verb, words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), *words])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    usage, rest = shown.split("\n", 1)
    assert usage.startswith(f"usage: modern-llm {verb} ")
    assert (
        "(required)" not in shown
        and "list[" not in shown
        and "ifdef" not in shown
        and "null)" not in shown
    )
    schema = VERBS[verb][0]
    required = [name for name, field in schema.model_fields.items() if field.is_required()]
    head, example = rest.split("\nexample:\n")
    assert all(f"--{name}" in head or f"  {name.upper()}" in rest for name in required)
    example = " ".join(example.split("\n\n")[0].split())
    assert example == schema.example
    for line in rest.splitlines():  # an option is followed by its text, here or in the next line
        assert not re.fullmatch(r"  --\S+", line) or len(line) > 24, line


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_the_help_is_a_command_line(verb):
    schema, words = VERBS[verb][0], shlex.split(VERBS[verb][0].example.partition(" > ")[0])
    assert words[: 1 + len(verb.split())] == ["modern-llm", *verb.split()]
    read_words(schema, words[1 + len(verb.split()) :], verb)


def test_help_of_a_stage_lists_the_frequent_options_first_and_all_with_all(capsys):
    for words, count in ((["--help"], 30), (["--help", "all"], 75)):
        with pytest.raises(SystemExit, match="0"):
            main(["dpo", *words])
        shown = capsys.readouterr().out
        assert ("modern-llm dpo --help all lists " in shown) == (len(words) == 1)
        assert len(re.findall(r"^  --", shown, re.M)) >= count
    assert all(re.search(rf"^  --{name} ", shown, re.M) for name in OFTEN if "dpo" in name)


def test_required_options_of_an_optional_section_are_marked_in_it(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["reference", "verify", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "required (RUN.yaml" not in shown
    assert "final model. (required in this section)" in shown
