"""The formats of rows: for each, the columns it is known by and the function that reads it.

A format is found by the columns of a row, never by the name of a data set. To add one, write one
function `(values, origin) -> record` and one row of a table at the end of this file. A function
checks every row: it raises `RowFault` for broken structure and `ContentFault` for content that
cannot be learnt from. It takes texts as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from modern_llm.data.read.checked import checked_instruction, checked_pair
from modern_llm.data.read.columns import (
    Values,
    answer_of,
    column,
    complete,
    earlier_turns,
    is_trained,
    messages_in,
    named,
    prompt_before,
    same_turns,
    system_words,
    text_in,
    without_weight,
)
from modern_llm.data.read.conversations import is_whole, whole_instruction, whole_pair
from modern_llm.data.read.published import (
    capybara,
    helpsteer_pair,
    orca_pair,
    ranked_pair,
    scored_pair,
)
from modern_llm.data.read.records import (
    ContentFault,
    Document,
    Instruction,
    LabelledResponse,
    Message,
    PreferencePair,
    RowFault,
)
from modern_llm.data.read.token_ids import instruction_of_ids, pair_of_ids

Record = PreferencePair | Instruction | LabelledResponse | Document
Mode = Literal["convert", "framed", "talk"]

DOCUMENT = "text"  # name of the one format of documents
ASSISTANT_TURN = "\n\nAssistant:"
ALPACA_FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_FRAME_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Format:
    """One way to read rows.

    `fits` looks at names and kinds of columns only (a null fits, so that it is reported as a null);
    `framed` takes the place of `convert` where the user gives no template, `talk` where a chat
    template writes strings as turns. `version` is a digest of a user's own function.
    """

    name: str
    columns: str
    fits: Callable[[Values], bool]
    convert: Callable[[Values, str], Record]
    framed: Callable[[Values, str], Record] | None = None
    talk: Callable[[Values, str], Record] | None = None
    version: str = ""

    def function(self, mode: Mode) -> Callable[[Values, str], Record]:
        """Return the function that reads rows in a mode."""
        return {"framed": self.framed, "talk": self.talk, "convert": None}[mode] or self.convert


def choose_format(formats: Sequence[Format], name: str, values: Values) -> Format:
    """Return the format of that name or, for `auto`, the first that fits the row.

    Raises:
        RowFault: none fits; names the columns found and those that each format wants.
    """
    for entry in formats:
        if entry.name == name or (name == "auto" and entry.fits(values)):
            return entry
    wanted = ", ".join(f"{entry.name} ({entry.columns})" for entry in formats)
    raise RowFault(
        f"no format for the columns {named(values)}: known are {wanted}; "
        f"{_other_kind(formats, values)}data.columns maps other names"
    )


def _other_kind(formats: Sequence[Format], values: Values) -> str:
    """Return a hint at the kind of data that the columns of a row belong to, or nothing."""
    kinds = {"preferences": PREFERENCES, "instructions": INSTRUCTIONS}
    for kind, table in kinds.items():
        if formats[-1] in table or values is None:
            continue
        if found := next((entry.name for entry in table if entry.fits(values)), None):
            verb = "dpo" if kind == "preferences" else "sft"
            if kind == "instructions" and "label" in values:
                kind, verb = "labelled", "kto"
            return f"as {kind} they are {found} (--kind {kind}, or the verb {verb}); "
    if formats[-1].name != DOCUMENT and isinstance(values.get("text"), str):
        return "as documents they are text (--kind documents, or the verb pretrain); "
    return ""


# Preferences


def hh_pair(values: Values, origin: str) -> PreferencePair:
    """Two transcripts, split after the last assistant mark; the answers follow it literally."""
    chosen, rejected = text_in(values, "chosen"), text_in(values, "rejected")
    ends = [side.rfind(ASSISTANT_TURN) + len(ASSISTANT_TURN) for side in (chosen, rejected)]
    if min(ends) < len(ASSISTANT_TURN):
        raise ContentFault("transcript without an assistant turn")
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        raise ContentFault("transcripts differ before the last turn")
    return checked_pair(prompt, chosen[ends[0] :], rejected[ends[1] :], origin)


def shp_pair(values: Values, origin: str) -> PreferencePair:
    """A post and two comments; `labels` 1 says that people preferred comment A, 0 comment B."""
    label = column(values, "labels")
    if isinstance(label, bool) or label not in (0, 1, "0", "1"):  # CSV has strings only
        raise RowFault(f"column 'labels' is {label!r}, expected 1 (A preferred) or 0 (B preferred)")
    answers = [text_in(values, "human_ref_A"), text_in(values, "human_ref_B")]
    chosen, rejected = answers if int(label) else answers[::-1]
    return checked_pair(text_in(values, "history"), chosen, rejected, origin)


def string_pair(values: Values, origin: str) -> PreferencePair:
    """`prompt`, `chosen` and `rejected`, literally."""
    prompt, chosen, rejected = (text_in(values, name) for name in ("prompt", "chosen", "rejected"))
    return checked_pair(prompt, chosen, rejected, origin)


def string_pair_as_turns(values: Values, origin: str) -> PreferencePair:
    """The same with the words of a column `system` and with tools, for a chat template."""
    pair = string_pair(values, origin)
    return replace(pair, prompt=complete(values, pair.prompt))


def message_pair(values: Values, origin: str) -> PreferencePair:
    """Message lists that share all turns but the last; the prompt may have its own column."""
    if is_whole(values):
        return whole_pair(values, origin)
    lead, chosen = answer_of(values, "chosen")
    other, rejected = answer_of(values, "rejected")
    if not same_turns(lead, other):
        raise ContentFault("transcripts differ before the last turn")
    prompt = complete(values, prompt_before(values, lead))
    # Messages of the same words may differ in keys that the template writes.
    second = None if lead == other else complete(values, prompt_before(values, other))
    return checked_pair(prompt, chosen, rejected, origin, second)


def sharegpt_pair(values: Values, origin: str) -> PreferencePair:
    """`conversations` before the answers, which are one `{"from", "value"}` each."""
    if is_whole(values):
        return whole_pair(values, origin, "conversations")
    prompt = complete(values, messages_in(values, "conversations"))
    answers = []
    for name in ("chosen", "rejected"):
        lead, answer = answer_of(values, name)
        if lead:
            raise RowFault(f"column {name!r} has {len(lead) + 1} turns, expected one answer")
        answers.append(answer)
    return checked_pair(prompt, *answers, origin)


# Instructions


def alpaca(values: Values, origin: str) -> Instruction:
    """The instruction and, where there is one, its input after an empty line."""
    instruction, given = _alpaca_fields(values)
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return checked_instruction(prompt, text_in(values, "output"), origin)


def alpaca_as_turns(values: Values, origin: str) -> Instruction:
    """The same after the words of `system` and the earlier turns of `history`, for a chat
    template."""
    row = alpaca(values, origin)
    turns = [
        {"role": role, "content": text}
        for pair in earlier_turns(values)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    prompt = [*turns, {"role": "user", "content": row.prompt}] if turns else row.prompt
    return replace(row, prompt=complete(values, prompt))


def alpaca_framed(values: Values, origin: str) -> Instruction:
    """The same in the two frames of Stanford Alpaca (Taori et al., 2023).

    The words of `system` take the place of the frame's first paragraph; earlier turns stand before
    the instruction, each with its answer.
    """
    instruction, given = _alpaca_fields(values)
    frame = ALPACA_FRAME_WITH_INPUT if given else ALPACA_FRAME
    task, _, fields = frame.partition("\n\n")
    before = "".join(
        f"### Instruction:\n{asked}\n\n### Response:\n{answer}\n\n"
        for asked, answer in earlier_turns(values)
    )
    # One pass: an instruction that holds "{input}" must not be filled in a second time.
    head, after = fields.split("{instruction}")
    head = f"{system_words(values) or task}\n\n{before}{head}"
    prompt = head + instruction + after.replace("{input}", given)
    return checked_instruction(prompt, text_in(values, "output"), origin)


def _alpaca_fields(values: Values) -> tuple[str, str]:
    given = text_in(values, "input") if "input" in values else ""
    return text_in(values, "instruction"), given if given.strip() else ""


def message_instruction(values: Values, origin: str) -> Instruction:
    """The last assistant turn that is trained on and the turns before it; what follows it is left
    out."""
    prompt: list[Message] = []
    if isinstance(values.get("prompt"), list):
        prompt = messages_in(values, "prompt")
        turns = [*prompt, *messages_in(values, _response_column(values))]
    else:
        turns = messages_in(values, "conversations" if "conversations" in values else "messages")
    if is_whole(values):
        return whole_instruction(values, turns, origin, len(prompt))
    spoken = [at for at, message in enumerate(turns) if message["role"] == "assistant"]
    trained = [at for at in spoken if is_trained(turns[at])]
    if not spoken:
        raise ContentFault("no assistant turn")
    if not trained:
        raise ContentFault("no assistant turn with a weight above 0")
    if trained[-1] == 0:
        raise ContentFault("no turn before the answer")
    *prompt, answer = (without_weight(message) for message in turns[: trained[-1] + 1])
    return checked_instruction(complete(values, prompt), answer, origin)


def string_instruction(values: Values, origin: str) -> Instruction:
    """`prompt` and `response` (or `completion`), literally."""
    response = text_in(values, _response_column(values))
    return checked_instruction(text_in(values, "prompt"), response, origin)


def string_instruction_as_turns(values: Values, origin: str) -> Instruction:
    """The same with the words of a column `system` and with tools, for a chat template."""
    row = string_instruction(values, origin)
    return replace(row, prompt=complete(values, row.prompt))


def _response_column(values: Values) -> str:
    return "completion" if "completion" in values and "response" not in values else "response"


def document(name: str) -> Format:
    """Return the format of documents in the column `name`."""

    def convert(values: Values, origin: str) -> Document:
        if name not in values:
            found = f"column {name!r} is missing; the row has {named(values)}"
            raise RowFault(f"{found}: name the one that holds the documents as text_column")
        text = text_in(values, name)
        if not text.strip():
            raise ContentFault("empty document")
        return Document(text, origin)

    return Format(DOCUMENT, name, lambda values: name in values, convert)


# Tables: a more specific format precedes one that would also fit.


OWN_PREFERENCES: list[Format] = []
OWN_INSTRUCTIONS: list[Format] = []
"""Formats that a user registered, tried before those below; see `own_formats`."""


def has_columns(*names: str) -> Callable[[Values], bool]:
    return lambda values: all(name in values for name in names)


def _has_list(values: Values, *names: str) -> bool:
    return any(isinstance(values.get(name), list) for name in names)


PREFERENCES = (
    Format(
        "shp",
        "history, human_ref_A, human_ref_B, labels",
        has_columns("history", "human_ref_A", "human_ref_B", "labels"),
        shp_pair,
    ),
    Format(
        "sharegpt",
        "conversations, chosen, rejected",
        has_columns("conversations", "chosen", "rejected"),
        sharegpt_pair,
    ),
    Format(
        "helpsteer",
        "context, response1, response2, overall_preference",
        has_columns("context", "response1", "response2", "overall_preference"),
        helpsteer_pair,
    ),
    Format(
        "ultrafeedback",
        "instruction, completions",
        lambda v: has_columns("instruction", "completions")(v) and _has_list(v, "completions"),
        scored_pair,
    ),
    Format(
        "nectar",
        "prompt, answers",
        lambda v: has_columns("prompt", "answers")(v) and _has_list(v, "answers"),
        ranked_pair,
    ),
    Format(
        "messages",
        "chosen and rejected as message lists, prompt optional",
        lambda v: (
            has_columns("chosen", "rejected")(v) and _has_list(v, "chosen", "rejected", "prompt")
        ),
        message_pair,
    ),
    Format(
        "strings",
        "prompt, chosen, rejected",
        has_columns("prompt", "chosen", "rejected"),
        string_pair,
        talk=string_pair_as_turns,
    ),
    Format(
        "orca",
        "question, chosen, rejected, system optional",
        has_columns("question", "chosen", "rejected"),
        orca_pair,
    ),
    Format("hh", "chosen and rejected as transcripts", has_columns("chosen", "rejected"), hh_pair),
    Format(
        "token_ids",
        "prompt_ids, chosen_ids, rejected_ids",
        has_columns("prompt_ids", "chosen_ids", "rejected_ids"),
        pair_of_ids,
    ),
)

INSTRUCTIONS = (
    Format(
        "capybara",
        "conversation",
        lambda v: _has_list(v, "conversation"),
        capybara,
    ),
    Format(
        "alpaca",
        "instruction, output, input optional",
        has_columns("instruction", "output"),
        alpaca,
        framed=alpaca_framed,
        talk=alpaca_as_turns,
    ),
    Format(
        "messages",
        "messages or conversations, or prompt and completion as message lists",
        lambda v: "messages" in v or "conversations" in v or _has_list(v, "prompt"),
        message_instruction,
    ),
    Format(
        "strings",
        "prompt, response or completion",
        lambda v: "prompt" in v and ("response" in v or "completion" in v),
        string_instruction,
        talk=string_instruction_as_turns,
    ),
    Format(
        "token_ids",
        "prompt_ids, response_ids or completion_ids",
        lambda v: "prompt_ids" in v and ("response_ids" in v or "completion_ids" in v),
        instruction_of_ids,
    ),
)
