"""The section `data` of preference pairs, under the name that scripts import."""

from modern_llm.config.data import PreferenceDatasetConfig

__all__ = ["PreferenceDatasetConfig"]
