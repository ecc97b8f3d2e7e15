"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from tests.helpers.models import random_pairs


@pytest.fixture
def unequal_pairs():
    """Very different lengths, one-token answers, an empty prompt."""
    return random_pairs([(9, 4, 13), (1, 1, 2), (0, 5, 3), (20, 1, 1), (3, 12, 7)])
