"""`modern_llm` gives every public name, imports nothing heavy for it, and refuses others."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import modern_llm

# Written down here, so that a name cannot vanish: scripts import them.
DOCUMENTED = """
    Callback ConfigError Control DPOConfig DataError DocumentDatasetConfig
    InstructionDatasetConfig KTOConfig LabelledDatasetConfig LoraConfig MoEConfig ModernLLMConfig
    NotFiniteError PairCollator PeerError PreferenceDatasetConfig ReferenceStore Stopped
    StorageError TokenScorer TrainState TrainingConfig UserError dpo kto preference_loss pretrain
    register_format register_loss run_dpo run_kto run_sft run_training sft
""".split()


def test_every_documented_name_is_there_and_listed():
    assert sorted(modern_llm.__all__) == sorted(DOCUMENTED) == sorted(modern_llm._HOMES)
    for name in DOCUMENTED:
        found = getattr(modern_llm, name)
        assert inspect.getdoc(found), name
        assert name in dir(modern_llm)
    assert modern_llm.__version__ == "0.1.0"


def test_they_are_the_objects_of_the_documented_modules():
    from modern_llm.config import TrainingConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    assert modern_llm.TrainingConfig is TrainingConfig
    assert modern_llm.run_dpo is run_dpo and modern_llm.DPOConfig is DPOConfig


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'run_ppo'"):
        _ = modern_llm.run_ppo


def test_the_import_alone_is_light():
    heavy = "{'torch', 'transformers', 'pydantic'}"
    code = f"import sys, modern_llm; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
