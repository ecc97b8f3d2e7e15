"""Reference values of pairs that come in windows: found or scored before a window's first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.runtime import Runtime
from modern_llm.reference.nonfinite_pairs import LIST, leave_out, not_finite
from modern_llm.reference.reference_pass import ReferencePass

Values = NDArray[np.float32]


class WindowValues:
    """The reference values of the current window's pairs.

    Args:
        first: (P, 2) values of the first window, None for a loss without stored values.
        folder: of the run's tables, with the list of dropped rows.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: DPOConfig,
        data: PreferenceDatasetConfig,
        reference: ReferencePass,
        first: Values | None,
        folder: Path,
    ):
        self._runtime, self._config, self._data = runtime, config, data
        self._reference, self._folder = reference, folder
        self._values, self._known = first, True

    def current(self) -> Values | None:
        """Return the values (P, 2) of the current window."""
        return self._values

    def look(self, prepared: Prepared) -> tuple[int, ...]:
        """Find the values of a window; return its pairs that have none that is finite.

        Raises:
            ConfigError: the loss cannot use a number of the pairs.
            DataError: too many pairs have a value that is not finite.
        """
        refuse_values(self._config, prepared)
        if not self._known:
            self._values = self._reference.values_of_window(prepared.train)
        self._known = False
        bad = not_finite(self._values)
        listed = self._folder / LIST
        leave_out(self._runtime, prepared, {"train": bad}, self._data.max_dropped, listed)
        return tuple(bad.tolist())


def refuse_values(config: DPOConfig, prepared: Prepared) -> None:
    """Refuse weights and margins of pairs that the loss cannot use."""
    found = [table for table in (prepared.train, prepared.evaluation) if table is not None]

    def given(name: str) -> bool:
        default = PreferenceDatasetConfig.values[name]
        values = (table.values(name) for table in found)
        return any(numbers is not None and (numbers != default).any() for numbers in values)

    config.refuse_values(weights=given("weight"), margins=given("margin"))
