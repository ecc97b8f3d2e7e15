"""Reading of damaged files, one after another, in a process with bounded memory.

The process imports everything once, reads each kind of file intact, and may then take one GiB more.
An exception of a reader is reported with the message and status of the command line. A reader that
hangs, dies or takes too long is an error of the trial.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

MEMORY = 2**30
SECONDS = 10.0
"""Of the processor: a machine that is busy with other work proves nothing against a reader."""
HANG_S = 90.0

SETTINGS = """\
train:
  run_name: "r"
  output_dir: out
  batch_size: 4
  max_steps: 3
  learning_rate: 1.0e-3
  mixed_precision: no
data:
  dataset_name: pairs.jsonl
dpo:
  beta: 0.1
  max_length: 96
sft_checkpoint: model
"""


@dataclass(frozen=True)
class Outcome:
    """How one reading ended; `text` is the error in one line, or the traceback of a bug."""

    status: int
    text: str
    seconds: float
    read: str


def make_seeds(folder: Path) -> dict[str, Path]:
    """Write one good file of every kind; kind -> file. Its folder is what it belongs to."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    import torch
    from transformers import AutoModelForCausalLM

    from modern_llm.config import ModernLLMConfig
    from modern_llm.models.build import build_model
    from modern_llm.models.pt_checkpoint import save_model
    from modern_llm.reference.store.entries import Entries
    from modern_llm.reference.store.layout import Identity
    from modern_llm.reference.store.store import ReferenceStore
    from modern_llm.storage.atomic import MANIFEST, committed_folder

    rows = transcripts(6)
    seeds = {"jsonl": write_jsonl(_new(folder, "jsonl") / "rows.jsonl", rows)}
    place = seeds["json"] = _new(folder, "json") / "rows.json"
    place.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    place = seeds["csv"] = _new(folder, "csv") / "rows.csv"
    lines = [
        ",".join('"' + row[c].replace('"', '""') + '"' for c in ("chosen", "rejected"))
        for row in rows
    ]
    place.write_text("chosen,rejected\n" + "\n".join(lines) + "\n", encoding="utf-8")
    place = seeds["parquet"] = _new(folder, "parquet") / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place)
    place = seeds["txt"] = _new(folder, "txt") / "rows.txt"
    place.write_text("\n\n".join(row["chosen"].strip() for row in rows), encoding="utf-8")
    place = seeds["yaml"] = _new(folder, "yaml") / "run.yaml"
    place.write_text(SETTINGS, encoding="utf-8")

    tokenizer = make_tokenizer(_new(folder, "tokenizer"))
    seeds["tokenizer.json"] = tokenizer / "tokenizer.json"
    seeds["tokenizer_config.json"] = tokenizer / "tokenizer_config.json"
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "gqa_groups": 1}
    model = make_checkpoint(_new(folder, "model"), tokenizer, **shape)
    seeds["safetensors"], seeds["config.json"] = model / "model.safetensors", model / "config.json"
    seeds["generation_config.json"] = model / "generation_config.json"
    split = _new(folder, "split")
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(split, max_shard_size="20KB")
    seeds["index"] = split / "model.safetensors.index.json"

    config = ModernLLMConfig(
        vocab_size=16, d_model=8, n_layers=1, n_heads=2, ffn_hidden_size=8, max_seq_len=8
    )
    seeds["pt"] = _new(folder, "pt") / "model.pt"
    save_model(seeds["pt"], config, build_model(config, seed=0))
    seeds["bin"] = _new(folder, "bin") / "pytorch_model.bin"
    shutil.copy(model / "config.json", seeds["bin"].parent)
    torch.save(
        AutoModelForCausalLM.from_pretrained(model).state_dict(),
        seeds["bin"],
    )
    with committed_folder(_new(folder, "run") / "step-00000001", {"step": 1}) as place:
        (place / "state.json").write_text("{}")
        shutil.copy(seeds["safetensors"], place)
    seeds["manifest"] = folder / "run" / "step-00000001" / MANIFEST

    identity = Identity("0" * 32, '{"dtype":"float32"}')
    store = ReferenceStore.at(_new(folder, "store"), identity)
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 70), dtype="S16")
    floats = np.linspace(-9, -1, 70, dtype=np.float32)
    store.append(Entries(keys, floats, np.ones(70, np.int32), None))
    seeds["store manifest"] = store.folder / MANIFEST
    seeds["shard"] = next(store.folder.glob("shard-*.safetensors"))
    return seeds


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def _read(kind: str, path: Path, tokenizer: Any) -> str:
    """Read one file as a run would, into Python values or tensors; say what was read."""
    from modern_llm.config import DocumentDatasetConfig, PreferenceDatasetConfig
    from modern_llm.data.table.build import prepare_tables
    from modern_llm.models import checkpoint_tensors, load
    from modern_llm.reference.store.store import ReferenceStore
    from modern_llm.storage.atomic import verified_manifest
    from modern_llm.verbs.settings import read_settings
    from modern_llm.verbs.stage_settings import DpoSettings

    out = path.parent / ".tables"
    if kind in ("jsonl", "json", "csv", "parquet", "txt"):
        shutil.rmtree(out, ignore_errors=True)
        if kind == "txt":
            section = DocumentDatasetConfig(dataset_name=str(path))
            table = prepare_tables(section, tokenizer, out, max_length=32).train
        else:
            section = PreferenceDatasetConfig(dataset_name=str(path))
            table = prepare_tables(section, tokenizer, out, max_length=96).train
        return f"{len(table)} rows"
    if kind == "yaml":
        settings = read_settings(DpoSettings, ["--config", str(path)], "dpo")
        return settings.train.run_name
    if kind.startswith("tokenizer"):
        found = load.load_tokenizer(path.parent)
        return str(found("the quick river")["input_ids"])
    if kind == "manifest":
        return str(verified_manifest(path.parent))
    if kind in ("store manifest", "shard"):
        store = ReferenceStore.open(path.parent)
        return str(store.verify())
    place = path if kind == "pt" else path.parent
    checkpoint = load.inspect_checkpoint(place)
    files = checkpoint_tensors.weight_files(checkpoint)
    names = [name for name, _ in checkpoint_tensors.stored_tensors(checkpoint, files)]
    load.load_model(checkpoint)
    return f"{len(names)} tensors"


def _serve(pipe: Connection, seeds: dict[str, Path]) -> None:
    """The process of the trials."""
    import logging

    from transformers.utils import logging as transformers_logging

    from modern_llm.cli import _one_line
    from modern_llm.config.errors import status_of
    from modern_llm.models.load import load_tokenizer

    os.fsync = lambda descriptor: None  # what is on disk is not asked here, and it takes long
    transformers_logging.set_verbosity_error()
    logging.getLogger("modern_llm").setLevel(logging.CRITICAL)
    tokenizer = load_tokenizer(seeds["tokenizer.json"].parent)
    for kind, path in seeds.items():
        _read(kind, path, tokenizer)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        kind, path = task
        began = time.process_time()
        try:
            status, text, read = 0, "", _read(kind, path, tokenizer)
        except Exception as error:
            status, read = status_of(error), ""
            text = _one_line(error)
            if status == 1:
                text = "Traceback\n" + "".join(traceback.format_exc(chain=False, limit=-6))
        pipe.send(Outcome(status, text, time.process_time() - began, read))


class Trials:
    """Context in which files are read in the other process."""

    def __init__(self, seeds: dict[str, Path]):
        self._seeds = seeds
        self._process: Any = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def read(self, kind: str, path: Path) -> Outcome:
        """Read `path` as a file of this kind.

        Raises:
            AssertionError: the reader hung, or its process died.
        """
        if self._process is None:
            self._start()
        self._pipe.send((kind, path))
        try:
            assert self._pipe.poll(HANG_S), f"{kind}: {path} is not read in {HANG_S} s"
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise AssertionError(f"{kind}: the reader died ({self._process.exitcode})") from None
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        # Memory that pools of other kinds reserve and do not use would count against the limit.
        os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._seeds), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.poll(300), "the process of the trials does not start"
        self._pipe.recv()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = None
