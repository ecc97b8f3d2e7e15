"""Chat templates render as in transformers, with limits of time and size, for a given date."""

from __future__ import annotations

import time
from datetime import date

import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.encode import template_limits
from modern_llm.data.encode.chat_template import FALLBACK_CHAT_TEMPLATE
from modern_llm.data.encode.rendering import reads_date, render_chat
from tests.helpers.text import make_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " a <b> & 'c' é"},
    {"role": "assistant", "content": "<think>x</think> yes", "reasoning_content": "why"},
    {"role": "user", "content": None or "more"},
]
PLAIN = {
    "fallback": FALLBACK_CHAT_TEMPLATE,
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m.content|trim ~ loop.index0 %}{{ loop.last }}{% endfor %}"
    "{{ ns.n }}{{ ns.text }}",
    "macros": "{% macro w(m, last=false) -%}\n  [{{ m.role|upper }}] {{ m['content'] }}\n"
    "{%- endmacro %}{% for m in messages %}{{ w(m) }}{{ '\\n' }}{% endfor %}",
    "methods": "{% for m in messages if m.role != 'system' %}{{ m.content.split('</think>')[-1]"
    ".lstrip('\\n').replace('a', 'bb') }}{{ '%s-%02d' % (m.role, loop.index) }}{{ '=' * 3 }}"
    "{% endfor %}{{ messages[1:][::-1]|map(attribute='role')|join(', ') }}",
    "json": "{{ messages|tojson }}{{ messages[0]|tojson(indent=2) }}{{ {'a': 1}.items()|list }}",
    "blocks": "{% set x %}{{ messages[0].content }} !{% endset %}{{ x }}"
    "{% if x is string %}s{% endif %}"
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.reasoning_content }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    "{% else %}none{% endfor %}{% filter upper %}b{% endfilter %}{{ bos_token }}{{ range(3)|sum }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from modern_llm.models.load import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder / "t")
    return load_tokenizer(folder / "t")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("opened", [True, False])
def test_templates_render_as_transformers_renders_them(name, opened, tokenizer):
    options = {"add_generation_prompt": opened}
    expected = tokenizer.apply_chat_template(
        TALK, chat_template=PLAIN[name], tokenize=False, **options
    )
    assert render_chat(tokenizer, TALK, template=PLAIN[name], **options) == expected
    assert expected


NEST = "{% for a in range(99999) %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": NEST * 4 + "{% endfor %}" * 4,
    "nested output": NEST * 3 + "xxxxxxxxxx" + "{% endfor %}" * 3,
    "times": "{{ 'a' * 10**9 }}",
    "times list": "{{ ([1] * 10**9)|length }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "tilde": "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "captured": "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a)|length }}",
    "replace filter": "{% set a = 'a' * 1000000 %}{{ a|replace('a', a)|length }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a.join('b' * 100000)|length }}",
    "join filter": "{% set a = 'a' * 1000000 %}{{ ('b' * 100000)|join(a)|length }}",
    "join of an iterator": "{% set a = 'a' * 1000000 %}{{ range(99999)|map('string')|join(a) }}",
    "replace, smaller": "{% set a = 'a' * 10000 %}{{ a|replace('a', a)|length }}",
    "indent": "{{ ('\\n' * 1000000)|indent(100000, true, true) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "power": "{{ (10 ** 1000000000) > 1 }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching": "{% macro f(n) %}{% if n %}"
    "{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "long": "{# " + "x" * 2_000_000 + " #}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_an_endless_or_huge_template_is_one_line(name, tokenizer, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    began = time.thread_time()
    with pytest.raises(DataError, match="chat template [0-9a-f]{12}") as raised:
        render_chat(tokenizer, TALK, template=BOMBS[name])
    assert time.thread_time() - began < 5
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_the_date_is_the_callers(tokenizer):
    template = "{{ strftime_now('%d %b %Y %H:%M') }}"
    for day, text in ((date(2024, 2, 29), "29 Feb 2024 00:00"), (date(1999, 1, 2), "02 Jan 1999 ")):
        assert render_chat(tokenizer, TALK, template=template, day=day).startswith(text)
    today = date.today()
    written = render_chat(tokenizer, TALK, template=template)
    assert written.startswith((f"{today:%d %b %Y}", f"{date.today():%d %b %Y}"))
    assert reads_date(template) and not reads_date(PLAIN["macros"])
