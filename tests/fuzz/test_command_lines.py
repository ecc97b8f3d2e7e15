"""Any command line ends in a run of its verb, its help, or one line of error with status 2.

The words are drawn from the options of the verbs themselves. A verb that would run is replaced by
one that notes it was reached, and nothing heavy may be imported on the way.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = 300

PROGRAM = r"""
import argparse, contextlib, io, random, sys, traceback
from modern_llm import cli
from modern_llm.verbs.command_line import add_options

reached = []
for verb, (schema, _) in cli.VERBS.items():
    cli.VERBS[verb] = (schema, lambda settings: reached.append(settings) or {})
cli._logging = lambda debug: contextlib.nullcontext()
cli.StopRequest = contextlib.nullcontext
folder, lines = sys.argv[1], int(sys.argv[2])
draw = random.Random(int(sys.argv[3]))

good = ["1", "0.5", "auto", "null", "x", f"{folder}/run.yaml", f"{folder}/pairs.jsonl", "[a, b]"]
bad = [
    "", " ", "-1", "1e999", "nan", "[", "{", "{}", "]", '{"a": 1}', '{"a":', "[1", '"', "'", "\\",
    "é", "日本", "\u202e", "\ud800", "\x00", "\x1b[2J", "%s", "%", "a" * 5000, "[" * 3000,
    ",", "true", "--", "-", "a=b", "=", "1,2", '{"a": {"b": [}}', "..", "/", "a\nb", folder,
    f"{folder}/broken.yaml", f"{folder}/none.yaml", "NaN", "[null]", "null,null", "{1: 2}",
]
words = [*good, *bad]
schemas = {}
for verb, (schema, _) in cli.VERBS.items():
    parser = argparse.ArgumentParser()
    add_options(parser, schema)
    options = [o for a in parser._actions for o in a.option_strings if o not in ("--debug",)]
    schemas[verb] = options, sorted({o.rpartition(".")[0] for o in options if "." in o})

def an_option(verb):
    options, sections = schemas[verb]
    name = draw.choice(options + sections * 3) if draw.random() < 0.9 else "--" + draw.choice(words)
    if draw.random() < 0.3:
        name = "--" + name[2:].replace("_", "-")
    if draw.random() < 0.05:
        name = name[:-1]
    style, value = draw.random(), draw.choice(words)
    return [name] if style < 0.15 else [f"{name}={value}"] if style < 0.4 else [name, value]

def a_line():
    verb = draw.choice(list(cli.VERBS))
    if draw.random() < 0.05:
        verb = draw.choice([*words, "reference", "reference foo", "version", "--help", "-h"])
    line = verb.split(" ") if draw.random() < 0.97 else []
    for _ in range(draw.randrange(5)):
        if draw.random() < 0.2:
            line.append(draw.choice(words))
        elif verb in schemas:
            option = an_option(verb)
            line += option * draw.choice([1, 1, 1, 2])
    return line

statuses = {}
for _ in range(lines):
    line, out, err = a_line(), io.StringIO(), io.StringIO()
    reached.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(line)
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            status = traceback.format_exc()
    said = err.getvalue()
    statuses[status] = statuses.get(status, 0) + 1
    if status == 0:
        assert not said and (reached or out.getvalue()), (line, said)
    else:
        assert status == 2 and not reached, (line, status, said)
        assert said.startswith("modern-llm: error: ") and said.count("\n") == 1, (line, said)
        assert len(said) < 6000, (line, len(said))
assert min(statuses[0], statuses[2]) > lines // 20, statuses
heavy = {"torch", "transformers", "accelerate", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_every_line_is_run_or_refused_in_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {run_name: a, output_dir: b}\nsft_checkpoint: c\n")
    (tmp_path / "broken.yaml").write_text("train: [")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(LINES), "1"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
