"""Templates that loop for ever or build giant texts end in a sentence, soon and without much memory."""

import resource
import time

import pytest

from lockstep.data import template_sandbox
from lockstep.data.chat_template import BadTemplate, ChatTemplates, RefusedChat
from lockstep.data.template_sandbox import LONGEST

_TWICE = "{% set x = x ~ x %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
        "{% set x = 'aaaaaaaa' %}" + _TWICE * 40,
        "{% set x = 'aaaaaaaa' %}" + "{% set x = x + x %}" * 40,
        "{% set x = ['a'] %}" + "{% set x = x + x %}" * 40,
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'a' }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{% set ns = namespace(x=7) %}{% for a in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a'|center(9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:9999999999}'.format('a') }}",
        "{{ '{:{}}'.format('a', 9999999999) }}",
        "{{ '{:{x}}'.format_map({'x': 9999999999}) }}",
        "{{ '{:{0[x]}}'.format({'x': 9999999999}) }}",
        "{{ ['{:9999999999}']|map('format', 1)|list }}",
        "{{ messages|tojson(indent=9999999999) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999)|replace('', 'b' * 99999) }}",
        "{{ ('\n' * 99999)|indent(99999) }}",
        "{{ ('a' * 9999).join(range(99999)|map('string')|list) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaa{% endfor %}{% endfor %}{% endset %}",
        "{{ range(99999)|batch(9999999999, 'x')|list }}",
        "{{ lipsum(9999999) }}",
    ],
)
def test_work_and_sizes_are_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "BUDGET", template_sandbox.BUDGET // 10)  # ten times as fast
    started, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((RefusedChat, BadTemplate)) as found:
        ChatTemplates({}, {"chat_template": template}).render([{"role": "user", "content": "x"}], None, {})
    assert "\n" not in str(found.value)
    assert time.thread_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


def test_a_long_conversation_is_within_bounds() -> None:
    template = (
        "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.role + ': ' + m.content|trim }}\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "a word or two " * 300}] * 1000
    text = ChatTemplates({}, {"chat_template": template}).render(messages, None, {})
    assert 4_000_000 < len(text) < LONGEST
