"""The ids trained on are those of the whole conversation, for eight forms of chat templates.

Expected is what the tokenizer makes of prompt and response in one call of `apply_chat_template`, up
to the end token of the response: a line break after it may be trained on or not. The forms are
those of well-known families, two of them with a prompt that the whole conversation does not begin
with.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, judged

TITLE = "Ids are those of the whole conversation"
SIDES = ("chosen", "rejected")


def run(trainer: Trainer, folder: Path) -> Outcome:
    rows = inputs.conversations(6)
    path = inputs.write_rows(folder / "rows.jsonl", rows)
    wrong = {}
    for name, (_, end) in inputs.TEMPLATES.items():
        place = folder / name.replace(" ", "-")
        model = inputs.model(place, template=name)
        found = trainer.call("tokens", model=model, rows=path, out=folder / f"{place.name}.jsonl")
        tokenizer = inputs.tokenizer(name)
        cut = tokenizer.convert_tokens_to_ids(end)
        off = sum(
            until(ids["prompt_ids"] + ids[f"{side}_ids"], cut)
            != until(whole(tokenizer, row["prompt"] + row[side]), cut)
            for ids, row in zip(found["rows"], rows, strict=True)
            for side in SIDES
        )
        if off:
            wrong[name] = off
    right = len(inputs.TEMPLATES) - len(wrong)
    text = f"{right} of {len(inputs.TEMPLATES)} forms"
    if wrong:
        text += ", not: " + "; ".join(wrong)
    return judged(not wrong, text, forms=len(inputs.TEMPLATES), wrong=wrong)


def whole(tokenizer, messages: list[dict]) -> list[int]:
    """Return the ids of a conversation in one call."""
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    return list(found["input_ids"])


def until(ids: list[int], end: int) -> list[int]:
    """Return ids up to the last end token."""
    last = len(ids) - ids[::-1].index(end) if end in ids else len(ids)
    return ids[:last]
