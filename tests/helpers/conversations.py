"""Conversations with tools, templates for them, and what `transformers` says is trained on."""

from __future__ import annotations

from typing import Any

MARKED = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>"
    "{{ '\n' }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson)"
    " + '\n</tool_call>' }}{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEASURED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(text: str, number: int, **more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": number}}
    return answer(text, tool_calls=[{"type": "function", "function": function}], **more)


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text}


COMMON = [user("What is 2 and 3?"), call("", 2, reasoning_content="Add."), result("2")]
CHOSEN = [call("Next.", 3), result('{"sum": 5}'), answer("It is 5.", reasoning_content="Five.")]
REJECTED = [call("Next.", 4), result("6"), call("Again.", 3), result("5"), answer("Six?")]
PAIRS = [
    {"tools": TOOLS, "chosen": [*COMMON, *CHOSEN], "rejected": [*COMMON, *REJECTED]},
    {"tools": TOOLS, "prompt": COMMON, "chosen": REJECTED, "rejected": [*CHOSEN, user("Thanks")]},
    {"tools": TOOLS, "prompt": COMMON[:1], "chosen": COMMON[1:] + CHOSEN, "rejected": REJECTED},
    {
        "prompt": "Hello?",
        "chosen": [answer("Yes, hello."), user("Who?"), answer("Me, the harbour.")],
        "rejected": [answer("Yes, no."), user("What?"), answer("Bread."), user("Oh"), answer("5")],
    },
    {"prompt": [user("Hi")], "chosen": [answer("One.")], "rejected": [answer("Two, three.")]},
]
SHARED_TURNS = (3, 3, 1, 1, 1)
TALKS = [
    {"tools": TOOLS, "messages": [*COMMON, *CHOSEN]},
    {"messages": [user("a"), answer("b"), user("c"), answer("d é 漢字", reasoning_content="e")]},
    {"messages": [user("only one"), answer("turn")]},
]


def sides_of(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The two conversations of a row of `PAIRS`, in plain Python."""
    prompt = row.get("prompt", [])
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    sides = [[*prompt, *row[name]] for name in ("chosen", "rejected")]
    return [side[:-1] if side[-1]["role"] == "user" else side for side in sides]


def plain(tokenizer: Any, messages: list[dict], tools: Any, shared: int) -> tuple[list, list]:
    """The ids and the assistant's mask as `transformers` has them, up to the last trained id;
    nothing of the first `shared` messages is trained on."""
    options = {"tools": tools, "chat_template": MARKED, "return_dict": True}
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    ids, mask = list(found["input_ids"]), list(map(bool, found["assistant_masks"]))
    before = []
    if shared:
        before = tokenizer.apply_chat_template(messages[:shared], **options)["input_ids"]
    mask[: len(before)] = [False] * len(before)
    end = max(at for at, trained in enumerate(mask) if trained) + 1
    return ids[:end], mask[:end]
