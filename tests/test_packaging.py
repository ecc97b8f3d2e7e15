"""The wheel and the sdist hold what they should and nothing else, and a wheel alone works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRESETS = ("accelerate_configs", "ds_configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built by the backend itself."""
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        check=True, capture_output=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    return folder


def tracked(folder: str) -> set[str]:
    """Files of the repository below a folder, as they would be packed."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_the_package_with_types_templates_and_licence(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert tracked("modern_llm") <= names
    assert {"modern_llm/py.typed", "modern_llm/report/templates/report.html"} <= names
    assert f"{info}/licenses/LICENSE" in names
    assert "modern-llm = modern_llm.cli:run" in entries
    presets = tracked("accelerate_configs") | tracked("ds_configs")
    assert {f"modern_llm/presets/{name}" for name in presets} <= names and len(presets) > 10
    others = {name for name in names if not name.startswith(("modern_llm/", info))}
    assert not others
    assert not any("__pycache__" in name for name in names)
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M))
    assert {"wandb", "tensorboard", "lora", "deepspeed", "completion", "docs", "test"} <= extras
    assert f"Version: {PROJECT['version']}" in metadata


def test_the_sdist_has_everything_to_build_test_and_read(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("modern_llm", "tests", "docs", "examples", "launch", *PRESETS):
        assert tracked(folder) <= names, folder
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert not any(name.startswith((".git/", ".venv", "experiments")) for name in names)


@pytest.mark.slow
def test_a_wheel_alone_runs_the_command_line(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    copied = tmp_path / "copied"
    for words in (["--help"], ["presets", "--copy", str(copied)], ["report"]):
        done = subprocess.run(
            [sys.executable, "-m", "modern_llm", *words],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60,
        )  # fmt: skip
        assert done.returncode == (2 if words == ["report"] else 0), done.stderr
        assert "Traceback" not in done.stderr
    # Who installs with pip gets the very files of the repository, in folders of the same names.
    for folder in PRESETS:
        for name in tracked(folder):
            assert (copied / name).read_bytes() == (ROOT / name).read_bytes()
    code = (
        "import modern_llm.report.page as p; from jinja2 import PackageLoader; "
        "print(PackageLoader('modern_llm.report', 'templates').list_templates(), p.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60,
    )  # fmt: skip
    assert "report.html" in done.stdout and str(tmp_path) in done.stdout, done.stderr


def test_every_third_party_import_is_a_dependency_or_an_extra():
    """What the import table allows is installed by this package, or by an extra of it."""
    from tests.test_architecture import TABLE

    names = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    declared = {re.split(r"[<>=\[;]", name)[0].lower().replace("-", "_") for name in names}
    allowed = {name.partition(".")[0] for row in TABLE.values() for name in row.third_party}
    aliases = {"yaml": "pyyaml", "IPython": "ipython"}
    # Comes with transformers, accelerate and datasets, in the version that they need.
    carried = {"huggingface_hub"}
    carried.add("(a computed name)")  # the modules of this package that `modern_llm` names
    missing = {aliases.get(n, n) for n in allowed} - declared - carried
    assert not missing


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## {re.escape(PROJECT['version'])}\b", text, re.M)


def test_the_oldest_python_can_read_every_file():
    """3.11 is promised: no syntax of a later one."""
    import ast

    assert PROJECT["requires-python"] == ">=3.11"
    for path in (ROOT / "modern_llm").rglob("*.py"):
        ast.parse(path.read_text("utf-8"), feature_version=(3, 11))
