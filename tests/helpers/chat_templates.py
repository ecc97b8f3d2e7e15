"""Chat templates in the manner of well-known families, rewritten and shortened.

`end` is the token that closes an answer, None where the template writes none. `system` and
`thoughts` say what a template takes. All special tokens are in `TOKENS`.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>",
    "<turn>", "</turn>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>",
    "<|call|>", "<|User|>", "<|Assistant|>", "<|START|>", "<|CLOSE|>", "<|role|>", "<|/role|>",
    "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]",
    "[CALLS]", "[RESULTS]", "[/RESULTS]",
]  # fmt: skip
PLAIN_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@dataclass(frozen=True)
class Chat:
    """One template and what is known of it."""

    text: str
    end: str | None
    system: bool = True
    thoughts: bool = False
    calls: bool = False
    opens: bool = True
    """Whether the generation prompt begins what the conversation writes."""


_LLAMA2 = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if sys else messages %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}<s>[INST] {% if loop.first and sys %}<<SYS>>\n{{ sys }}\n<</SYS>>"
    "\n\n{% endif %}{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "<|bos|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
_MISTRAL1 = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + '</s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL3 = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
    "{% set talk = messages[1:] %}{% else %}{% set talk = messages %}{% endif %}"
    "{% set users = talk | selectattr('role', 'equalto', 'user') | list %}<s>"
    "{% for m in talk %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% if loop.last and sys is defined %}[INST] {{ sys + '\n\n' + m.content }}[/INST]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}"
    "{% elif m.tool_calls is defined %}[CALLS] [{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}[RESULTS] {{ m.content }}[/RESULTS]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}"
    "\n{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'assistant' %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
    "{% endif %}\n{% endfor %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}\n{{ m.content }}{% endif %}{% for c in m.tool_calls %}"
    "{% set c = c.function if c.function is defined else c %}\n<tool_call>\n"
    '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=messages | length - 1, found=false) %}"
    "{% for m in messages[::-1] %}{% if not ns.found and m.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% set words = m.content if m.content is string else '' %}"
    "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ words }}<|im_end|>\n"
    "{% else %}{% set thought = '' %}{% if m.reasoning_content is string %}"
    "{% set thought = m.reasoning_content %}{% elif '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}"
    "\n</think>\n\n{% endif %}{{ words.lstrip('\n') }}"
    "{% for c in m.tool_calls or [] %}{% if not loop.first or words %}\n{% endif %}"
    "{% set c = c.function or c %}<tool_call>\n"
    '{"name": "{{ c.name }}", "arguments": '
    "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}"
    "}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
_R1 = (
    "{% set ns = namespace(sys='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.sys = m.content %}{% endif %}{% endfor %}<|bos|>{{ ns.sys }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "{% set words = m.content %}{% if '</think>' in words %}"
    "{% set words = words.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + words + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_DEEPSEEK3 = (
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}<|Assistant|>{% for c in m.tool_calls %}"
    "{{ 'CALL ' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}"
    "</s>{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}</s>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
_GEMMA = (
    "<|bos|>{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_GPT_OSS = (
    "<|start|>system<|message|>Knowledge cutoff: 2024-06<|end|>{% for m in messages %}"
    "{% if m.role == 'system' %}<|start|>developer<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' and m.tool_calls %}{% if m.thinking %}<|start|>assistant"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set c = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ c.name }}<|channel|>"
    "commentary json<|message|>{{ c.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>"
    "analysis<|message|>{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final"
    "<|message|>{{ m.content }}{% if loop.last and not add_generation_prompt %}<|return|>"
    "{% else %}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_COMMAND = (
    "<|bos|>{% for m in messages %}<|START|>"
    "{{ {'user': '<|user|>', 'assistant': '<|assistant|>', 'system': '<|system|>'}[m.role] }}"
    "{{ m.content.strip() }}<|CLOSE|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|><|assistant|>{% endif %}"
)
_GRANITE = (
    "{% for m in messages %}<|role|>{{ m.role }}<|/role|>{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|/role|>{% endif %}"
)
_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALWAYS_OPEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"
_NO_END = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
_END_BETWEEN = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% if not loop.last %}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

CHATS = {
    "llama-2": Chat(_LLAMA2, "</s>"),
    "llama-3": Chat(_LLAMA3, "<|eot|>"),
    "mistral-v0.1": Chat(_MISTRAL1, "</s>", system=False),
    "mistral-v0.3": Chat(_MISTRAL3, "</s>", system=False, calls=True),
    "zephyr": Chat(_ZEPHYR, "</s>"),
    "chatml": Chat(_CHATML, "<|im_end|>"),
    "qwen2.5": Chat(_QWEN25, "<|im_end|>", calls=True),
    "qwen3": Chat(_QWEN3 + "{% endif %}", "<|im_end|>", thoughts=True, calls=True),
    "qwen3 that opens a thought": Chat(
        _QWEN3 + "<think>\n{% endif %}", "<|im_end|>", thoughts=True
    ),
    "qwen3 that closes a thought": Chat(
        _QWEN3 + "<think>\n\n</think>\n\n{% endif %}", "<|im_end|>", opens=False
    ),
    "deepseek-r1": Chat(_R1, "</s>", opens=False),
    "deepseek-v3": Chat(_DEEPSEEK3, "</s>", calls=True),
    "gemma": Chat(_GEMMA, "</turn>", system=False),
    "phi-3": Chat(_PHI3, "<|end|>"),
    "gpt-oss": Chat(_GPT_OSS, "<|return|>", thoughts=True, calls=True),
    "command-r": Chat(_COMMAND, "<|CLOSE|>"),
    "granite": Chat(_GRANITE, "</s>"),
    "generation blocks": Chat(_GENERATION, "<|im_end|>"),
    "always open": Chat(_ALWAYS_OPEN, "</s>"),
    "no end token": Chat(_NO_END, None),
    "end token between turns only": Chat(_END_BETWEEN, None),
}
