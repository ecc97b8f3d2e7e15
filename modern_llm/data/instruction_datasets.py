"""The section `data` of instructions, under the name that scripts import."""

from modern_llm.config.data import InstructionDatasetConfig

__all__ = ["InstructionDatasetConfig"]
