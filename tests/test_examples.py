"""Every example is a whole configuration, and goes through `--dry-run` on a tiny model.

Rows with the same columns replace the data sets of the Hub.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modern_llm.cli import main
from modern_llm.verbs.stages import read_stage
from tests.helpers.text import WORDS, make_checkpoint, make_tokenizer, transcripts, write_jsonl

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"), max_seq_len=1024)
    return folder


def split(row: dict) -> tuple[str, str, str]:
    prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
    return prompt + mark, chosen, row["rejected"].rpartition(mark)[2]


def turns(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def stand_in(name: str, count: int = 80) -> list[dict]:
    """Rows with the columns of a data set of the Hub."""
    pairs = [split(row) for row in transcripts(count)]
    if name == "Anthropic/hh-rlhf":
        return transcripts(count)
    if name == "stanfordnlp/SHP":
        return [
            {"history": p, "human_ref_A": (r, c)[i % 2], "human_ref_B": (c, r)[i % 2],
             "labels": i % 2, "score_A": 5, "score_B": 9}
            for i, (p, c, r) in enumerate(pairs)
        ]  # fmt: skip
    if name == "HuggingFaceH4/ultrafeedback_binarized":
        return [
            {"prompt": p, "chosen": turns(p, c), "rejected": turns(p, r),
             "score_chosen": 8.0, "score_rejected": 6.0}
            for p, c, r in pairs
        ]  # fmt: skip
    if name == "tatsu-lab/alpaca":
        return [{"instruction": p, "input": "", "output": c} for p, c, _ in pairs]
    assert name == "HuggingFaceFW/fineweb-edu", name
    return [{"text": " ".join(WORDS) * 60 + str(i)} for i in range(count)]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_tried_dry(file, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    stage, settings = read_stage(file)
    # The stand-ins are short runs: none of the warm-ups fits.
    words = ["--train.output_dir", str(tmp_path / "out"), "--dry-run", "--json"]
    words += ["--train.warmup_steps", "0"]
    name = settings.data.dataset_name
    if name is not None and not Path(name).exists():
        data = write_jsonl(tmp_path / "data.jsonl", stand_in(name))
        words += ["--data.dataset_name", str(data)]
        for option in ("split", "eval_split", "subset"):
            if getattr(settings.data, option, None) is not None:
                words += [f"--data.{option}", "null"]
    model = place / "model"
    words += {
        "dpo": ["--sft_checkpoint", str(model)],
        "kto": ["--sft_checkpoint", str(model)],
        "sft": ["--pretrain_checkpoint", str(model)],
        # The shape is the example's but for its size; the tokenizer is the tiny one.
        "pretrain": ["--train.tokenizer_name", str(model), "--model.vocab_size", "300",
                     "--model.d_model", "32", "--model.n_layers", "2",
                     "--model.max_seq_len", "64", "--data.eval_fraction", "0.2"],
    }[stage.name]  # fmt: skip
    assert main([stage.name, "--config", str(file), *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["forward_backward"]["grad_norm"] > 0
    assert result["first_batch"]["examples"] == settings.train.batch_size
    assert not (tmp_path / "out").exists()


def test_the_readme_lists_every_example():
    text = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES and all(f"`{file.name}`" in text for file in EXAMPLES)
