"""What the options of other trainers are here: TRL, Axolotl and LLaMA-Factory, as tables.

`modern-llm migrate` translates a configuration with them, and an unknown option in ours is
recognised: "`logging_steps` of TRL is train.log_every here". The rules that compute values are in
`verbs/migration/rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from modern_llm.config.foreign import axolotl, llama_factory, trl
from modern_llm.config.foreign.rows import Tool

TOOLS = (
    Tool("TRL", trl.ROWS, trl.NOT_NEEDED, trl.NO_EQUIVALENT, trl.DEFAULTS),
    Tool("Axolotl", axolotl.ROWS, axolotl.NOT_NEEDED, axolotl.NO_EQUIVALENT, axolotl.DEFAULTS),
    Tool(
        "LLaMA-Factory",
        llama_factory.ROWS,
        llama_factory.NOT_NEEDED,
        llama_factory.NO_EQUIVALENT,
        llama_factory.DEFAULTS,
    ),
)


def meaning_here(word: str, known: Iterable[str]) -> str:
    """Return what an option of another trainer is here, for the end of a message, or nothing.

    Args:
        known: the options that may be set, as the user writes them: `train.seed`, `--train.seed`
            on a command line, or `seed` in Python.
    """
    options = set(known)
    for tool in TOOLS:
        row = tool.rows.get(word)
        for target in row.targets if row else ():
            short = target.rpartition(".")[2]
            forms = (target, f"--{target}", short, f"--{short}")
            if ours := next((form for form in forms if form in options), None):
                note = f": {row.note}" if row and row.note else ""
                return f" ({word} of {tool.name} is {ours} here{note})"
    for tool in TOOLS:
        if reason := tool.reason(word):
            needed = tool.group(word) == "not needed"
            verdict = "needs no option here" if needed else "has no equivalent here"
            return f" ({word} of {tool.name} {verdict}: {reason})"
    return ""
