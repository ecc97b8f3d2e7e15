"""One line for each expectation of a GPU at the end of the tests: held, failed or not tried."""

from __future__ import annotations

WORDS = {"passed": "held", "failed": "failed", "error": "failed", "skipped": "not tried"}
ORDER = ["failed", "not tried", "held"]


def pytest_terminal_summary(terminalreporter):
    found: dict[str, str] = {}
    for outcome, word in WORDS.items():
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.rpartition("::")[2].partition("[")[0]
            if "tests/gpu/" in report.nodeid:
                # The worst of a test's parameters.
                found[name] = min(word, found.get(name, word), key=ORDER.index)
    for name in sorted(found):
        sentence = name.removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(f"{found[name]:>9}: {sentence}")
