"""Tests, in the tree of the package; `tests.helpers` is what they share."""
