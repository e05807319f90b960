"""Chat templates against `transformers`, side by side, and what is said of those that cannot be used."""

import json
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from lockstep.data.chat_template import BadTemplate, ChatTemplates, RefusedChat
from tests.data.template_shapes import CONVERSATIONS, SHAPES, TOOLS

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
OPTIONS = [{"add_generation_prompt": True}, {"add_generation_prompt": False, "enable_thinking": False}]


@pytest.fixture(scope="module", params=[NAMES, {"eos_token": "</s>"}], ids=["bos", "no bos"])
def theirs(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(models.BPE()), **request.param)


def ours(template: Any, messages: Any, tools: Any = None, **variables: Any) -> str:
    return ChatTemplates({}, {"chat_template": template}).render(messages, tools, variables)


def rendered(template: Any, theirs: PreTrainedTokenizerFast, messages: Any, **options: Any) -> str:
    theirs.chat_template = template
    return theirs.apply_chat_template(messages, tokenize=False, **options)


def or_refused(render: Callable[[], str]) -> str:
    """What is rendered, or the template's own words where it refuses the conversation."""
    try:
        return render()
    except jinja2.TemplateError as error:
        return f"refused: {error}"
    except RefusedChat as error:
        return str(error).replace("the chat template refuses these messages:", "refused:").replace(": give others,", "")
    except (TypeError, ValueError, KeyError) as error:
        return f"the chat template fails on these messages ({type(error).__name__}: {error}) or mend it"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_rendered_as_transformers_does(shape: str, theirs: PreTrainedTokenizerFast) -> None:
    template, names = SHAPES[shape], theirs.special_tokens_map
    compiled = ChatTemplates({}, {"chat_template": template})
    found = []
    for messages, tools, options in product(CONVERSATIONS.values(), (None, TOOLS), OPTIONS):
        found.append(or_refused(lambda: compiled.render(messages, tools, {**names, **options})))  # noqa: B023
        assert found[-1] == or_refused(lambda: rendered(template, theirs, messages, tools=tools, **options))  # noqa: B023
    accepted = sum("these messages" not in text and not text.startswith("refused:") for text in found)
    assert accepted >= (4 if "bos_token" in names else 0)


def test_named_templates_are_chosen_by_whether_there_are_tools(theirs: PreTrainedTokenizerFast) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools|length }}"}]
    messages = CONVERSATIONS["a question"]
    assert [ours(named, messages, tools) for tools in (None, TOOLS, [])] == ["plain", "tools 2", "tools 0"]
    as_dict = {each["name"]: each["template"] for each in named}
    assert rendered(as_dict, theirs, messages, tools=TOOLS) == ours(as_dict, messages, TOOLS) == "tools 2"
    assert ours(named[:1], messages, TOOLS) == "plain"


def test_a_file_of_its_own_comes_before_the_settings() -> None:
    files = {"chat_template.jinja": "jinja", "chat_template.json": json.dumps({"chat_template": "json"})}
    messages = CONVERSATIONS["a question"]
    assert ChatTemplates(files, {"chat_template": "settings"}).render(messages, None, {}) == "jinja"
    del files["chat_template.jinja"]
    assert ChatTemplates(files, {"chat_template": "settings"}).render(messages, None, {}) == "settings"
    assert ChatTemplates(files, {}).render(messages, None, {}) == "json"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template: set task.chat=false"),
        ([], "no chat template"),
        ([{"name": "tool_use", "template": "x"}], "'tool_use', and none is called 'default'"),
        ([{"name": "default"}], "chat_template must be a text, or a list"),
        (["x"], "chat_template must be a text, or a list"),
        (7, "chat_template must be a text, or a list"),
        ("{% for %}", r"cannot be read: .* \(line 1\)"),
        ("\n{% nonsense %}", r"cannot be read: .*nonsense.* \(line 2\)"),
        ("{{ 'a'|no_such_filter }}", "cannot be read: .*no_such_filter"),
        ("{{ " + "(" * 20_000 + "}}", "cannot be read"),
        ("{{ " + "-" * 20_000 + "1 }}", "cannot be read"),
        ("{% for a in b %}" * 50 + "{% endfor %}" * 50, "cannot be read"),
    ],
)
def test_templates_that_cannot_be_used_are_one_sentence(template: Any, words: str) -> None:
    with pytest.raises(BadTemplate, match=words) as found:
        ours(template, CONVERSATIONS["a question"])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Only users speak here.') }}", "refuses these messages: Only users speak here."),
        ("{{ messages[5].content }}", "refuses these messages: .*has no element 5"),
        ("{{ messages[0]['content'] + 1 }}", "fails on these messages .TypeError: "),
        ("{{ 1 // 0 }}", "fails on these messages .ZeroDivisionError: "),
        ("{{ 'x'.__class__.mro() }}", "refuses these messages: .*unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on these messages .RecursionError: "),
        ("{{ {1: set} | tojson }}{{ messages | tojson(indent=dict) }}", "the chat template (refuses|fails)"),
    ],
)
def test_a_refused_conversation_is_one_sentence(template: str, words: str) -> None:
    with pytest.raises(RefusedChat, match=words) as found:
        ours(template, CONVERSATIONS["a question"])
    assert "\n" not in str(found.value)


def test_a_conversation_without_messages_is_refused() -> None:
    with pytest.raises(RefusedChat, match="at least one message"):
        ours("x", [])


NAMED = """messages m m.content m['role'] tools ns.x x 0 3 -1 100000 9999999999 'a' none true [] {} () {'k':1} loop
    loop.index bos_token range(9) range(100000) raise_exception('no') strftime_now('%Y') namespace(x=1) cycler lipsum
    x.y.z m.__class__ ''.join([]) 'a'.format(1) caller() joiner()"""
FILTERS = """tojson trim length list join upper map('upper') select sort center(999999999) indent(5000) last sum string
    replace('','aaaa') batch(3) format(1) default(1) first int tojson(indent=99999999) map(attribute='x') dictsort"""
OPERATORS = "+ - * ** / // % ~ == in and or"
EXPRESSIONS = st.recursive(
    st.sampled_from(NAMED.split()),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS.split()), inner),
        st.builds("({}|{})".format, inner, st.sampled_from(FILTERS.split())),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("{}({})".format, inner, inner),
    ),
    max_leaves=6,
)
PIECES = st.recursive(
    st.one_of(st.builds("{{{{ {} }}}}".format, EXPRESSIONS), st.text("ab{}%#- \n", max_size=6)),
    lambda inner: st.one_of(
        st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% for x in {} recursive %}}{}{{{{ loop([x, x]) }}}}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% set x = {} %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% set ns = namespace(x='a') %}}{{% set ns.x = {} %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% macro f(x) %}}{}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, EXPRESSIONS),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{}{{% continue %}}".format, inner),
        st.builds("{}{}".format, inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(template=PIECES, messages=st.sampled_from(list(CONVERSATIONS.values())))
def test_any_template_is_rendered_or_refused_in_a_sentence(template: str, messages: list[dict[str, Any]]) -> None:
    with suppress(BadTemplate, RefusedChat):
        ours(template, messages, bos_token="<s>")
