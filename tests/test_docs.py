"""The documentation is true of the program: commands parse, configurations load, tables match, and
the API reference builds without a warning."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from modern_llm.cli import VERBS, _split
from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.kto import KTOConfig
from modern_llm.objectives.catalogue import LOSSES
from modern_llm.verbs.command_line import read_words
from modern_llm.verbs.stages import read_stage

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
)


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [(p.name, text) for p in PAGES for text in pattern.findall(p.read_text("utf-8"))]


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every call of modern-llm in a block of shell lines."""
    found = []
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            before, mark, rest = line.partition("modern-llm ")
            if not mark:
                before, mark, rest = line.partition("-m modern_llm ")
            if mark and not before.lstrip().startswith("#") and "pip install" not in line:
                found.append((page, rest))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:40])
def test_every_command_exists_with_its_options(page, line):
    words = shlex.split(line, comments=True)
    verb, rest = _split([word for word in words if word not in (">", ">>", "&")])
    if verb == "VERB":
        return
    assert verb in VERBS, (page, line)
    if "--help" in rest:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        read_words(VERBS[verb][0], rest, verb)
    for at, word in enumerate(rest):
        if word == "--config" and rest[at + 1].startswith("examples/"):
            assert (ROOT / rest[at + 1]).is_file(), (page, line)


def test_there_are_commands_and_configurations():
    assert len(commands()) > 15 and len(blocks("yaml")) >= 2 and blocks("python")


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: value[:20])
def test_every_configuration_loads(page, text, tmp_path):
    values = yaml.safe_load(text)
    if "train" in values and len(values) > 1:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        read_stage(file)
        return
    schemas = {
        "data": (PreferenceDatasetConfig, DocumentDatasetConfig),
        "train": (TrainingConfig,),
        "dpo": (DPOConfig,),
        "kto": (KTOConfig,),
    }
    for name, section in values.items():
        if name == "train":
            section = {"run_name": "a", "output_dir": "b"} | section
        errors = []
        for schema in schemas[name]:
            try:
                schema(**section)
                break
            except ValueError as error:
                errors.append(error)
        else:
            raise AssertionError((page, errors))


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: value[:20])
def test_python_examples_import_what_there_is(page, text):
    tree = ast.parse(text)
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), page, "exec"), {})


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not (page.parent / target).exists():
                broken.append((page.name, target))
    assert not broken


def test_the_table_of_losses_is_the_catalogues():
    text = (ROOT / "docs" / "reference" / "losses.md").read_text("utf-8")
    found = {}
    for names, reference in re.findall(r"^\| (`[^|]*`) \|.*\| (yes|no) \|$", text, re.M):
        found |= dict.fromkeys(re.findall("`([a-z_]+)`", names), reference == "yes")
    assert found == {name: row.reference for name, row in LOSSES.items()}


def test_options_named_in_tables_exist():
    sections = {
        "train": TrainingConfig.__pydantic_fields__,
        "data": PreferenceDatasetConfig.__pydantic_fields__
        | DocumentDatasetConfig.__pydantic_fields__
        | InstructionDatasetConfig.__pydantic_fields__,
    }
    sections["dpo"] = DPOConfig.__pydantic_fields__
    sections["kto"] = KTOConfig.__pydantic_fields__
    wrong = [
        (page.name, f"{section}.{name}")
        for page in PAGES
        for section, name in re.findall(
            r"`(train|data|dpo|kto)\.([a-z_]+)", page.read_text("utf-8")
        )
        if name not in sections[section]
    ]
    assert not wrong


GPU_ROW = re.compile(r"^\| ([\d.]+B: [^|]+) \| ([^|]+) \| (>=|<=) ([\d.]+) \| [\d.]+ \|$", re.M)


def unfounded(section: str) -> list[str]:
    """Figures that stand there without the device, date and versions they were seen with."""
    found = re.search(r"^Device: .+\. Date: 20\d\d-\d\d-\d\d\. Versions: .*torch \d", section, re.M)
    rows = GPU_ROW.findall(section)
    return [name for name, seen, *_ in rows if seen != "not measured" and not found]


def test_figures_of_a_gpu_stand_with_device_and_date_or_not_at_all():
    text = (ROOT / "docs" / "reference" / "benchmarks.md").read_text("utf-8")
    section = text.partition("## On a GPU")[2].partition("\n## ")[0]
    assert {(name, sign, float(need)) for name, _, sign, need in GPU_ROW.findall(section)} == {
        *((f"{shape}: pairs/s over TRL", ">=", 3.0) for shape in ("0.5B", "1.2B")),
        *((f"{shape}: peak memory over TRL", "<=", 0.5) for shape in ("0.5B", "1.2B")),
        *((f"{shape}: trees over packed rows", ">=", 1.35) for shape in ("0.5B", "1.2B")),
        ("1.2B: MFU", ">=", 0.45),
    }
    assert not unfounded(section)
    claimed = section.replace("TRL | not measured", "TRL | 4.1", 1)
    assert unfounded(claimed) == ["0.5B: pairs/s over TRL"]
    seen = "\nDevice: NVIDIA H200. Date: 2026-12-01. Versions: modern-llm 0.1.0, torch 2.13.0.\n"
    assert not unfounded(claimed + seen)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150


@pytest.mark.slow
def test_pages_and_api_reference_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    pytest.importorskip("myst_parser", reason="the extra `docs` is not installed")
    pytest.importorskip("furo", reason="the extra `docs` is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html",
         "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reference = tmp_path / "html" / "reference"
    api = (reference / "api.html").read_text("utf-8")
    for name in ("run_dpo", "TrainingConfig.learning_rate", "preference_loss", "evaluate_pairs"):
        assert name.split(".")[-1] in api, name
    assert "FieldInfo" not in api and "OnResume" not in api
    options = (reference / "options.html").read_text("utf-8")
    sections = {"train": TrainingConfig, "dpo": DPOConfig, "data": PreferenceDatasetConfig}
    for section, schema in sections.items():
        for name in schema.__pydantic_fields__:
            assert f'id="{section}-{name.replace("_", "-")}"' in options, name
    commands_page = (reference / "commands.html").read_text("utf-8")
    assert all(f'id="verb-{verb.replace(" ", "-")}"' in commands_page for verb in VERBS)


def test_the_picture_of_the_architecture_is_up_to_date():
    source = (ROOT / "docs" / "concepts" / "draw_architecture.py").read_text()
    names: dict = {"__name__": "draw_architecture"}
    exec(compile(source, "draw_architecture.py", "exec"), names)
    picture = (ROOT / "docs" / "concepts" / "architecture.svg").read_text()
    assert names["draw"]() == picture, "run python docs/concepts/draw_architecture.py"
    drawn = {box.name for row in names["ROWS"] for box in row}
    package = ROOT / "modern_llm"
    assert all((package / name).is_dir() for name in drawn - {"cli"})
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders == {name.partition("/")[0] for name in drawn - {"cli"}}


def test_the_picture_of_a_result_is_small_and_is_drawn_from_a_run(tmp_path):
    assert (ROOT / "docs" / "result.svg").stat().st_size < 60_000
    names: dict = {"__name__": "draw_result"}
    exec(compile((ROOT / "docs" / "draw_result.py").read_text(), "draw_result.py", "exec"), names)
    lines = [
        {
            "step": step,
            "loss": 0.7 - step / 10,
            "rewards/chosen": step / 2,
            "rewards/rejected": -step / 2,
            "rewards/margins": step,
        }
        for step in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("train: {run_name: a}\n")
    root = ElementTree.fromstring(names["draw"](tmp_path))
    titles = [text.text for text in root.iter() if text.get("class") == "title"]
    assert titles == ["Loss", "Rewards", "Reward margin"]
    keys = [text.text for text in root.iter() if text.get("class") == "key"]
    assert keys[1] == "— chosen · ┄ rejected"
