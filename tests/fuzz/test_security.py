"""No file content is executed, and no file name in a file leads out of its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import StorageError, status_of
from modern_llm.models import checkpoint_tensors, load
from modern_llm.storage import atomic
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.trials import _read, make_seeds


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def payloads(canary: Path, folder: Path) -> dict[str, bytes]:
    """The payload in each form that a loader might unpickle; each form is shown to work."""
    forms = {
        "pickle": pickle.dumps(Payload(canary)),
        "old pickle": pickle.dumps(Payload(canary), 0),
    }
    for name, new in (("zip", True), ("before zip", False)):
        torch.save(
            {"config": {}, "model_state": Payload(canary)},
            folder / "payload",
            _use_new_zipfile_serialization=new,
        )
        forms[name] = (folder / "payload").read_bytes()
    for name, content in forms.items():
        (folder / "payload").write_bytes(content)
        if name in ("pickle", "old pickle"):
            pickle.loads(content)
        else:
            torch.load(folder / "payload", weights_only=False)
        canary.rmdir()  # fails if the payload did not run
    return forms


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def tokenizer(seeds):
    return load.load_tokenizer(seeds["tokenizer.json"].parent)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("payloads")
    canary = folder / "canary"
    return canary, payloads(canary, folder)


ALONGSIDE = (
    "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "random_states_0.pkl", "latest", "mp_rank_00_model_states.pt", "adapter_model.bin",
    "model.pkl", "tokenizer.pkl", "vocab.pkl", "dataset.py", "sitecustomize.py", "__init__.py",
)  # fmt: skip
"""Names under which other programs look for pickles or code."""


def harmless(read, canary: Path) -> str:
    """Run `read`, which may return or raise an error that users can fix."""
    try:
        text = str(read())
    except Exception as error:
        if status_of(error) not in (2, 3):
            raise
        text = str(error)
    assert not canary.exists(), text
    return text


KINDS = (
    "jsonl", "json", "csv", "parquet", "txt", "yaml", "tokenizer.json", "tokenizer_config.json",
    "safetensors", "config.json", "generation_config.json", "index", "pt", "bin", "manifest",
    "store manifest", "shard",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_in_place_of_any_input_does_not_run(kind, seeds, tokenizer, planted, tmp_path):
    assert set(KINDS) == set(seeds)
    canary, forms = planted
    for name, content in forms.items():
        place = shutil.copytree(seeds[kind].parent, tmp_path / name) / seeds[kind].name
        place.write_bytes(content)
        harmless(lambda place=place: _read(kind, place, tokenizer), canary)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "index", "tokenizer.json", "manifest"])
def test_payloads_under_the_names_of_other_programs_do_not_run(
    kind, seeds, tokenizer, planted, tmp_path
):
    canary, forms = planted
    for name, content in forms.items():
        place = shutil.copytree(seeds[kind].parent, tmp_path / name) / seeds[kind].name
        for other in ALONGSIDE:
            if not (place.parent / other).exists():
                (place.parent / other).write_bytes(content)
        harmless(lambda place=place: _read(kind, place, tokenizer), canary)


def run(folder: Path, model: Path, pairs: Path) -> Path:
    config = TrainingConfig(
        run_name="r", output_dir=folder, batch_size=4, max_steps=2, save_every=1, log_every=1,
        learning_rate=1e-3,
    )  # fmt: skip
    section = PreferenceDatasetConfig(dataset_name=str(pairs))
    return run_dpo(model, config, DPOConfig(max_length=96), section)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps without its final model, so that it resumes from its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    os.environ["MODERN_LLM_CACHE"] = str(folder / "cache")
    model = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    pairs = write_jsonl(folder / "pairs.jsonl", transcripts(12))
    shutil.rmtree(run(folder / "run", model, pairs))
    (folder / "run" / "outcome.json").unlink()
    return folder / "run", model, pairs, folder / "cache"


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("resealed", [False, True])
def test_a_payload_in_every_file_of_a_run_folder_does_not_run(
    finished, planted, tmp_path, monkeypatch, resealed
):
    """`resealed`: the attacker also writes a matching manifest; digests show only integrity."""
    source, model, pairs, cache = finished
    monkeypatch.setenv("MODERN_LLM_CACHE", str(cache))
    canary, forms = planted
    newest = sorted((source / "checkpoints").iterdir())[-1]
    slots = files_of(source) if not resealed else files_of(newest)
    assert len(slots) >= 4
    for slot in slots:
        here = shutil.copytree(source, tmp_path / "run")
        place = here / slot if not resealed else here / "checkpoints" / newest.name / slot
        place.write_bytes(forms["zip" if "." in slot else "pickle"])
        if resealed and place.name != atomic.MANIFEST:
            facts = atomic.verified_manifest(newest)
            (place.parent / atomic.MANIFEST).unlink()
            atomic._write_manifest(place.parent, atomic.seal(place.parent), facts)
        harmless(lambda here=here: run(here, model, pairs), canary)
        shutil.rmtree(here)


def test_code_in_a_model_folder_is_not_run(seeds, tmp_path):
    canary = tmp_path / "canary"
    code = f"import os\nos.mkdir({str(canary)!r})\n"
    folder = shutil.copytree(seeds["safetensors"].parent, tmp_path / "model")
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "trust_remote_code": True,
        "auto_map": {
            "AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X",
            "AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"],
        },
    }  # fmt: skip
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": config["auto_map"], "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    for kind in ("llama", "x"):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))

        def read():
            checkpoint = load.inspect_checkpoint(folder)
            load.load_tokenizer(folder)
            return load.load_model(checkpoint)

        text = harmless(read, canary)
        assert kind == "x" or "LlamaForCausalLM" in text  # it loads, with the stock architecture


def test_a_chat_template_cannot_reach_python(seeds, tmp_path):
    canary = tmp_path / "canary"
    tokenizer = load.load_tokenizer(seeds["tokenizer.json"].parent)
    reach = "''.__class__.__mro__[1].__subclasses__()"
    tokenizer.chat_template = f"{{% for c in {reach} %}}{{{{ c }}}}{{% endfor %}}"
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert not canary.exists()


OUTSIDE = ["../secret", "a/../../secret", "/etc/hostname", "./../secret", "..", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_name_a_file_outside(name, tmp_path):
    with atomic.committed_folder(tmp_path / "a", {"step": 1}) as place:
        (place / "one").write_text("1")
    (tmp_path / "secret").write_text("1")
    path = tmp_path / "a" / atomic.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["one"]
    manifest["own"] = atomic._own_digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(StorageError):
        atomic.verified_manifest(tmp_path / "a")


@pytest.mark.parametrize("what", ["file", "folder", "manifest"])
def test_a_link_in_a_committed_folder_is_refused(what, tmp_path):
    with atomic.committed_folder(tmp_path / "a", {"step": 1}) as place:
        (place / "sub").mkdir()
        (place / "sub" / "one").write_text("1")
    place = tmp_path / "a" / {"file": "sub/one", "folder": "sub", "manifest": "MANIFEST.json"}[what]
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        atomic.verified_manifest(tmp_path / "a")


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "a/b", ".."])
def test_an_index_cannot_name_weights_outside(name, seeds, tmp_path):
    folder = shutil.copytree(seeds["index"].parent, tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    part = next(iter(index["weight_map"].values()))
    shutil.copy(folder / part, tmp_path / "other.safetensors")
    index["weight_map"] = {k: name if v == part else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of its folder"):
        checkpoint = load.inspect_checkpoint(folder)
        checkpoint_tensors.weight_files(checkpoint)
    with pytest.raises(ValueError, match="leads out of its folder"):
        load.load_model(load.inspect_checkpoint(folder))


def test_adapters_on_themselves_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path)})
    )
    with pytest.raises(ValueError, match="or is this folder"):
        load.inspect_checkpoint(tmp_path)


def test_a_pt_archive_with_paths_in_it_writes_nothing(seeds, tokenizer, tmp_path):
    place = tmp_path / "in" / "model.pt"
    place.parent.mkdir()
    shutil.copy(seeds["pt"], place)
    with zipfile.ZipFile(place, "a") as archive:
        archive.writestr("../../escaped", b"x")
    harmless(lambda: _read("pt", place, tokenizer), tmp_path / "escaped")
    assert files_of(tmp_path) == ["in/model.pt"]
