"""How every causal LM of `transformers` runs: `python -m tests.models.families_table` prints it.

Tiny random models, made of configurations alone, are probed as a run probes its model. The result
is the table of `docs/reference/architectures.md`. Names of families print only these.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from dataclasses import dataclass

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES
from transformers.utils import logging as transformers_logging

from modern_llm.config.errors import UserError
from modern_llm.config.printable import first_line
from modern_llm.models.load import make_scorer
from modern_llm.models.twin import one_thread
from tests.helpers.families import UNBUILT, build_family

TREES, MIXED, ROWS, REFUSED = (
    "trees",
    "trees, mixers on one sequence per response",
    "separate rows",
    "not at all",
)


@dataclass(frozen=True)
class Finding:
    """How one family runs, and why."""

    family: str
    way: str
    why: str = ""


def finding(family: str) -> Finding:
    """Build and probe a tiny model of one family."""
    if family in UNBUILT:
        return Finding(family, REFUSED, f"no tiny model: {UNBUILT[family]}")
    try:
        found = make_scorer(build_family(family), dropout=False).capabilities
    except UserError as error:
        return Finding(family, REFUSED, _plain(str(error)))
    except Exception as error:  # the model's code may raise anything
        return Finding(family, REFUSED, _plain(first_line(error)))
    if found.trees:
        return Finding(family, MIXED if found.mixers else TREES, ", ".join(found.mixers))
    why = next(note for note in found.notes if note.startswith("separate rows: "))
    alone = "" if found.padded else "one row per forward; "
    return Finding(family, ROWS, alone + _plain(why.removeprefix("separate rows: ")))


def _plain(reason: str) -> str:
    """Return a reason without measured numbers, which differ between machines."""
    reason = re.sub(r"^\w+: ", "", reason)
    reason = re.sub(r" by [\d.e+-]+ nats a token| by [\w.]+% of the gradient", "", reason)
    reason = re.sub(r" \((of a small model of this architecture, )?up to \d+ tokens\)", "", reason)
    return reason.replace("|", "\\|")


def table(findings: list[Finding]) -> str:
    """Return the findings in Markdown: counts, trees in one line, the others one row each."""
    by_way = {w: [f for f in findings if f.way == w] for w in (TREES, MIXED, ROWS, REFUSED)}
    lines = ["| runs as | families |", "|---|---|"]
    lines += [f"| {way} | {len(found)} |" for way, found in by_way.items()]
    names = ", ".join(f"`{f.family}`" for f in by_way[TREES])
    lines += ["", "Trees:", "", names]
    for way, title in ((MIXED, "mixers"), (ROWS, "reason"), (REFUSED, "reason")):
        lines += ["", f"{way[0].upper()}{way[1:]}:", "", f"| family | {title} |", "|---|---|"]
        lines += [f"| `{f.family}` | {f.why} |" for f in by_way[way]]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    """Print the table of these families, by default of all; progress goes to stderr."""
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        print(f"unknown families {', '.join(unknown)}", file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    findings = []
    with one_thread():
        for name in sorted(names or FAMILIES):
            findings.append(finding(name))
            print(f"{name}: {findings[-1].way} {findings[-1].why}", file=sys.stderr, flush=True)
    print(table(findings), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
