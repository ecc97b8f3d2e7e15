"""The result of `modern-llm inspect` as JSON values: totals, sources, warnings, examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from modern_llm.data.encode.chat_template import Tokenizer
from modern_llm.data.encode.tokenizer import Ids
from modern_llm.data.inspect.statistics import Examined, summary_of
from modern_llm.data.inspect.warnings import (
    Setup,
    contradictions,
    findings,
    leakage,
    length_bias,
    prefix_saving,
    repeated,
    training_rows,
)
from modern_llm.data.table.gaps import none, trained_of


def inspection(
    sources: Sequence[Examined], setup: Setup, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the whole result of an inspection.

    Args:
        tokenizer: decodes the examples; without one they are shown as ids.
    """
    train = [source for source in sources if source.role == "train"]
    formats: dict[str, int] = {}
    for source in train:
        formats[source.format] = formats.get(source.format, 0) + source.report.kept
    if setup.kind == "documents":
        tokens = sum(s.weight * int(s.kept["text"][~s.held_out].sum()) for s in train)
        examples = tokens // setup.max_length
    else:
        examples = training_rows(sources)
    shown = [_example(source, entry, tokenizer) for source in train for entry in source.examples]
    return {
        "kind": setup.kind,
        "rows": sum(source.report.rows for source in train),
        "kept": sum(source.report.kept for source in train),
        "dropped": sum(source.report.dropped for source in train),
        "formats": formats,
        "max_length": setup.max_length,
        "batch_size": setup.batch_size,
        "steps_per_epoch": math.ceil(examples / setup.batch_size),
        "sources": [_source(source) for source in sources],
        "leakage": leakage(sources),
        "warnings": [finding.as_dict() for finding in findings(sources, setup)],
        "examples": shown,
    }


def _source(source: Examined) -> dict[str, Any]:
    report, rows = source.report, max(len(source.pairs), 1)
    return {
        "name": source.name,
        "role": source.role,
        "weight": source.weight,
        "format": source.format,
        "why": source.why,
        "rows": report.rows,
        "kept": report.kept,
        "dropped": report.dropped,
        "drops": report.drops,
        "held_out": report.evaluation_examples,
        "tokens": report.tokens,
        "lengths": {name: summary_of(source.whole[name]) for name in source.columns},
        "lengths_after_truncation": {
            name: summary_of(source.kept[name]) for name in source.columns
        },
        "truncated": {name: round(count / rows, 4) for name, count in source.cut.items()},
        "without_end_token": {
            name: round(count / rows, 4)
            for name, count in source.unended.items()
            if name != "prompt"
        },
        "score_ties": source.score_ties,
        "equal_pairs": sum(n for reason, n in report.drops.items() if "equal" in reason),
        "empty_fields": sum(n for reason, n in report.drops.items() if "empty" in reason),
        "empty_prompts": int((source.whole["prompt"] == 0).sum()) if len(source.columns) > 1 else 0,
        "duplicate_rows": repeated(source.pairs),
        "duplicate_prompts": repeated(source.prompts) if len(source.columns) > 1 else 0,
        "contradicting_rows": contradictions(source),
        "length_bias": length_bias(source),
        "prefix_sharing": prefix_saving(source),
        "values": report.values,
        "notes": report.notes,
    }


def _example(
    source: Examined, entry: tuple[str, list[Ids]], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return one example token by token, with the targets marked, as training lays it out."""
    origin, cells = entry
    prefix, gaps = cells[0][: 0 if len(cells) == 1 else None], getattr(cells, "gaps", ())
    columns = []
    used = [at for at, cell in enumerate(cells) if at < 3 or len(cell)]  # rankings are padded
    for at in used:
        name, ids = source.columns[at], cells[at]
        pieces = _pieces(ids, tokenizer)
        targets = trained_of(gaps[at] if gaps else none(), len(ids))
        if at or len(cells) == 1:
            targets[: not len(prefix)] = False  # nothing precedes it
        else:
            targets[:] = False
        columns.append(
            {
                "column": name,
                "text": "".join(pieces) if tokenizer is None else tokenizer.decode(ids.tolist()),
                "tokens": pieces,
                "target": targets.tolist(),
            }
        )
    return {"origin": origin, "source": source.name, "columns": columns}


def _pieces(ids: Ids, tokenizer: Tokenizer | None) -> list[str]:
    """Return the text of each token; a character of several tokens belongs to the last one."""
    if tokenizer is None:
        return [f"{number} " for number in ids.tolist()]
    pieces, waiting = [], []
    for number in ids.tolist():
        waiting.append(number)
        text = tokenizer.decode(waiting)
        if text.endswith("\ufffd") and len(waiting) < 4:  # UTF-8 has at most four bytes
            pieces.append("")
            continue
        pieces.append(text)
        waiting = []
    if waiting:
        pieces[-1] = tokenizer.decode(waiting)
    return pieces
