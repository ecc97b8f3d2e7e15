"""Make the environment of a trainer: python audit/environments.py FOLDER NAME [NAME ...]

Each trainer gets FOLDER/NAME, a virtual environment with the exact versions of
`audit/environments/NAME.txt`; this package itself is installed from this clone. What pip refuses is
written to the result `NAME-install.json`, and the page then says so in every cell of the trainer.

    python audit/environments.py --pin NAME    # resolve NAME afresh and write its list of versions
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
LISTS = HERE / "environments"
TORCH = "torch==2.13.0"
LEFT_OUT = ("torchvision",)
"""Not in the lists: no check needs it, and its build for CUDA fails beside a torch for CPUs."""
PACKAGES = {
    "modern_llm": "",
    "trl": "trl==1.16.0",
    "axolotl": "axolotl",
    "ms_swift": "ms-swift",
    "llamafactory": "llamafactory",
    "openrlhf": "openrlhf",
    "unsloth": "unsloth",
}


def python_of(folder: Path, name: str) -> Path:
    """Return the interpreter of a trainer's environment."""
    return folder / name / "bin" / "python"


def make(folder: Path, name: str) -> str:
    """Make an environment; return pip's reason if it cannot be made, else an empty text."""
    venv.create(folder / name, with_pip=True, clear=True)
    pip = [str(python_of(folder, name)), "-m", "pip", "install", "--quiet"]
    words = ["--no-deps", "-r", str(LISTS / f"{name}.txt")]  # the lists are complete
    if name == "modern_llm":
        root = HERE.parent
        words = ["-c", str(root / "constraints.txt"), "-e", f"{root}[lora]"]
    done = subprocess.run([*pip, *words], capture_output=True, text=True)
    return "" if done.returncode == 0 else reason(done.stderr)


def reason(text: str) -> str:
    """Return the lines in which pip says why, without its warnings."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line.partition("ERROR:")[2].strip() for line in lines if line.startswith("ERROR:")]
    # A source distribution that cannot be built: the error of its own script, and pip's of it.
    named += [line for line in lines if re.match(r"\w+Error: |\u00d7 ", line)]
    return "; ".join(dict.fromkeys(named))[:400] or (
        lines[-1][:400] if lines else "no reason given"
    )


def resolve(name: str) -> tuple[list[str], str]:
    """Ask pip for the versions that a trainer would get; return them, or pip's reason."""
    with tempfile.TemporaryDirectory() as place:
        report, limits = Path(place, "report.json"), Path(place, "limits.txt")
        limits.write_text(f"{TORCH}\n")
        words = ["install", "--dry-run", "--ignore-installed", "-c", str(limits)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words, "--report", str(report), PACKAGES[name]],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            package = re.findall(r"^\s*Collecting (\S+)", done.stdout, re.M)[-1:]
            return [], ": ".join([*package, reason(done.stderr)])
        found = json.loads(report.read_text())["install"]
    # Without the tag of a build: the index of each machine has its own.
    pins = [f"{i['metadata']['name']}=={i['metadata']['version'].split('+')[0]}" for i in found]
    pins = [pin for pin in pins if pin.partition("==")[0] not in LEFT_OUT]
    return sorted(pins, key=str.lower), ""


def record(name: str, refused: str, seconds: float) -> None:
    """Write the result of an installation."""
    cell = {
        "trainer": name,
        "version": version(name),
        "check": "install",
        "verdict": "does not run here" if refused else "holds",
        "sentence": refused or "installed from its pinned list",
        "figures": {},
        "command": f"python audit/environments.py FOLDER {name}",
        "seconds": round(seconds, 1),
    }
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"{name}-install.json"
    path.write_text(json.dumps(cell, indent=1, ensure_ascii=False) + "\n", "utf-8")


def version(name: str) -> str:
    """Return the pinned version of a trainer, empty if it has no list."""
    listed, package = LISTS / f"{name}.txt", PACKAGES[name].partition("==")[0]
    lines = listed.read_text().splitlines() if listed.exists() else []
    found = (line.partition("==")[2] for line in lines if same(line.partition("==")[0], package))
    return next(found, "")


def same(one: str, other: str) -> bool:
    return one.lower().replace("_", "-") == other.lower().replace("_", "-")


def main() -> int:
    """Make or pin the named environments; the status is 1 if one was refused."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, nargs="?", help="where the environments are made")
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    options.add_argument("--pin", choices=PACKAGES, help="resolve and write a list of versions")
    given = options.parse_args()
    if given.pin:
        pins, refused = resolve(given.pin)
        if not refused:
            (LISTS / f"{given.pin}.txt").write_text("\n".join(pins) + "\n")
        print(refused or f"{len(pins)} versions")
        return int(bool(refused))
    if given.folder is None or not given.names:
        options.error("name a folder and at least one trainer")
    unknown = sorted(set(given.names) - set(PACKAGES))
    if unknown:
        options.error(f"there is no trainer {unknown[0]}: use one of {', '.join(PACKAGES)}")
    status = 0
    for name in given.names:
        start, refused = time.monotonic(), ""
        if name != "modern_llm" and not (LISTS / f"{name}.txt").exists():
            _, refused = resolve(name)
            refused = refused or f"has no pinned list: run --pin {name} first"
        refused = refused or make(given.folder.resolve(), name)
        record(name, refused, time.monotonic() - start)
        print(f"{name}: {refused or 'ready'}", flush=True)
        status |= bool(refused)
    return status


if __name__ == "__main__":
    sys.exit(main())
