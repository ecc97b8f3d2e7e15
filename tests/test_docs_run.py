"""The pages are run as written: every `modern-llm` line of a page, in order, in one folder.

What a page names is there under that name: Hub ids as folders beside it (a folder of that name
comes before the Hub), tiny models, few rows. Runs are cut to two steps. Lines for launchers,
clusters and the Hub's upload are run elsewhere or cannot be run here; `ELSEWHERE` says which.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from modern_llm.cli import main
from modern_llm.training import loop
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.test_docs import PAGES, ROOT, blocks

ELSEWHERE = {
    "accelerate launch": "tests/distributed/test_launchers.py",
    "torchrun.sh": "tests/distributed/rendezvous/test_two_nodes.py",
    "two_nodes_local.sh": "tests/distributed/rendezvous/test_two_nodes.py",
    "--push_to_hub": "needs an account",
    "sbatch": "tests/launch/test_sweep.py",
    "completion": "tests/verbs/test_completion.py",
    "--help": "tests/verbs/test_help_text.py",
}
MODELS = (
    "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-70B-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/sft_model", "models/sft",
)  # fmt: skip
"""Names of tiny models."""
AXOLOTL = """
base_model: path/to/sft_model
rl: dpo
datasets: [{path: pairs.jsonl}]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
output_dir: runs/migrated
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with all that the pages name."""
    place = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer(place / "gpt2")
    for name in MODELS:
        make_checkpoint(place / name, tokenizer, max_seq_len=1024)
    rows = [{**row, "category": ("ask", "tell")[i % 2]} for i, row in enumerate(transcripts(90))]
    for name in ("pairs.jsonl", "held_out.jsonl"):
        write_jsonl(place / name, rows)
    for name in ("train", "test"):
        (place / "Anthropic" / "hh-rlhf").mkdir(parents=True, exist_ok=True)
        write_jsonl(place / "Anthropic" / "hh-rlhf" / f"{name}.jsonl", rows)
    labels = [
        {"prompt": row["chosen"].rpartition("Assistant:")[0], "completion": row["rejected"][-20:],
         "label": i % 2 == 0}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    write_jsonl(place / "responses.jsonl", labels)
    answers = [{"prompt": f"Say {n}.", "response": f" {n}!"} for n in range(40)]
    write_jsonl(place / "instructions.jsonl", answers)
    write_jsonl(place / "prompts.jsonl", [{"prompt": "why?"}, {"prompt": "how?"}])
    (run,) = (text for _, text in blocks("yaml") if text.startswith("# run.yaml"))
    (place / "run.yaml").write_text(run)
    for name in ("examples", "accelerate_configs", "ds_configs"):
        shutil.copytree(ROOT / name, place / name)
    return place


@pytest.fixture
def short(monkeypatch) -> None:
    """Every run ends after two steps."""
    real = loop.total_steps
    monkeypatch.setattr(loop, "total_steps", lambda *given: min(2, real(*given)))


def lines_of(page: Path) -> list[str]:
    """Every shell line of a page that calls this package."""
    text = page.read_text("utf-8")
    found = []
    for block in text.split("```bash\n")[1:]:
        for line in block.partition("```")[0].replace("\\\n", " ").splitlines():
            if line.lstrip().startswith("modern-llm ") or any(name in line for name in ELSEWHERE):
                found.append(line.strip())
    return [line for line in found if not any(name in line for name in ELSEWHERE)]


def prepare(page: str, place: Path, cache: Path) -> None:
    """Make what a page speaks of as done before."""
    if page in ("export.md", "lora.md"):
        pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    if page == "evaluate.md":
        shutil.copytree(place / "models" / "sft", place / "runs" / "dpo" / "dpo-hh_final")
    elif page == "export.md":
        for folder, words in (("dpo", []), ("lora", ["--lora.rank", "4"])):
            words = [*words, "--train.output_dir", f"runs/{folder}", "--train.save_every", "1"]
            assert main(["dpo", "--config", "run.yaml", *words]) == 0
    elif page in ("migrate.md", "coming_from.md"):
        (place / "run.yaml").unlink()  # it is what the page makes
        for name in ("axolotl.yaml", "theirs.yaml"):
            (place / name).write_text(AXOLOTL)
    elif page in ("data.md", "my_data.md"):
        rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
        columns = {"question": ["why?"] * len(rows)}
        columns |= {new: [row[old] for row in rows] for new, old in
                    (("best", "chosen"), ("worst", "rejected"))}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(columns), place / "answers.parquet")
    elif page == "own_loss.md":
        text = (ROOT / "docs" / "howto" / page).read_text("utf-8")
        for name in ("my_losses", "my_formats"):
            (code,) = (c for c in text.split("```python\n")[1:] if c.startswith(f"# {name}.py"))
            (place / f"{name}.py").write_text(code.partition("```")[0])
        rows = [{"question": f"why {n}?", "votes": {" yes": n, " no": 9}} for n in range(200)]
        write_jsonl(place / "votes.jsonl", rows)
    elif page == "watch.md":
        for beta in ("0.05", "0.1", "0.3"):
            words = ["--dpo.beta", beta, "--train.output_dir", f"runs/beta-{beta}"]
            assert main(["dpo", "--config", "run.yaml", *words]) == 0
    elif page == "resume.md":  # the run that is made longer has a checkpoint, two steps or not
        settings = yaml.safe_load((place / "run.yaml").read_text())
        settings["train"]["save_every"] = 1
        (place / "run.yaml").write_text(yaml.safe_dump(settings))
    elif page == "reference_elsewhere.md":
        assert main(["reference", "fill", "--config", "run.yaml"]) == 0
        (store,) = (cache / "references").iterdir()
        for name in ("A", "B"):
            shutil.copytree(store, place / name)


RUN_PAGES = [page for page in PAGES if lines_of(page)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page may hold several runs, on a machine that tests more beside it
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_page_runs_as_written(page, world, tmp_path, short, monkeypatch, capsys):
    place, cache = tmp_path / "here", tmp_path / "cache"
    shutil.copytree(world, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("MODERN_LLM_CACHE", str(cache))
    prepare(page.name, place, cache)
    for line in lines_of(page):
        monkeypatch.setattr("sys.stdin", io.StringIO("why?\n"))
        words = shlex.split(line, comments=True)[1:]
        status = main(words)
        shown = capsys.readouterr()
        assert status == 0, f"{line}\n{shown.out}\n{shown.err}"
