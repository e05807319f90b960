"""Chat templates, rendered as `transformers` renders them: the same names, filters and blocks, in a bounded sandbox.

https://huggingface.co/docs/transformers/chat_templating describes what templates may use.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from lockstep.data import template_sandbox
from lockstep.data.json_text import Bad, parsed_json
from lockstep.data.template_sandbox import TemplateSandbox

Message = Mapping[str, Any]

_BLOCK = ("lockstep_generation_begins", "lockstep_generation_ends")
"""Variables of which a rendering has the values around each `{% generation %}` block; nothing where they are not given.
"""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message may have its reasoning; templates read the first, those of gpt-oss the second."""


class BadTemplate(ValueError):
    """A chat template that is missing or that Jinja cannot read."""


class RefusedChat(ValueError):
    """A conversation that the chat template refuses, or fails on."""


class ChatTemplates:
    """The chat templates of a tokenizer, by name: most have one, `default`; some have another for tools."""

    def __init__(self, files: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """
        Args:
            files: of the tokenizer, name → text. `chat_template.jinja` comes before the settings' key
                `chat_template`, and that before `chat_template.json`.
            settings: of tokenizer_config.json.
        """
        self._files, self._settings = files, settings
        self._compiled: dict[str, jinja2.Template] = {}

    @cached_property
    def sources(self) -> dict[str, str]:
        """Names and texts of the templates.

        Raises:
            BadTemplate: when a file or a key holds something else.
        """
        if self._files.get("chat_template.jinja"):
            return {"default": self._files["chat_template.jinja"]}
        found = self._settings.get("chat_template")
        return _named(_of_json(self._files.get("chat_template.json", "{}")) if found is None else found)

    @cached_property
    def marks_generation(self) -> bool:
        """Whether a template has `{% generation %}` blocks, which say what an assistant wrote."""
        return any("endgeneration" in source for source in self.sources.values())

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        generation: tuple[str, str] | None = None,
    ) -> str:
        """Render a conversation.

        Args:
            tools: JSON schemas of functions; None where there are none, which templates distinguish from an empty list.
            variables: what else the template may use.
            generation: what to write before and behind each `{% generation %}` block.

        Raises:
            BadTemplate: when there is no template, or it cannot be read.
            RefusedChat: says in the template's words why it refuses the conversation.
        """
        if not messages:
            raise RefusedChat("a conversation needs at least one message, and has none")
        template = self._template("tool_use" if tools is not None and "tool_use" in self.sources else "default")
        given = {"documents": None, **variables, "tools": tools, "messages": [_completed(m) for m in messages]}
        given |= zip(_BLOCK, generation or ("", ""), strict=True)
        template_sandbox.begin()
        try:
            return template.render(given)
        except jinja2.TemplateError as error:
            raise RefusedChat(f"the chat template refuses these messages: {error.message}") from error
        except Exception as error:  # templates may compute anything
            raise RefusedChat(
                f"the chat template fails on these messages ({type(error).__name__}: {error}): give others, or mend it"
            ) from error

    def _template(self, name: str) -> jinja2.Template:
        if name not in self.sources:
            known = ", ".join(map(repr, self.sources))
            raise BadTemplate(
                f"the tokenizer has the chat templates {known}, and none is called 'default': rename one"
                if known
                else "the tokenizer has no chat template: set task.chat=false, and chat=false beside a source, or "
                "convert a chat model"
            )
        if name not in self._compiled:
            self._compiled[name] = _compiled(self.sources[name])
        return self._compiled[name]


def _named(found: Any) -> dict[str, str]:
    """Templates by name: one text is the default."""
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        found = {each.get("name"): each.get("template") for each in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for item in found.items() for text in item):
        raise BadTemplate("chat_template must be a text, or a list of objects with a name and a template")
    return found


def _of_json(text: str) -> Any:
    values = parsed_json(text)
    if isinstance(values, Bad) or not isinstance(values, dict):
        reason = values.reason if isinstance(values, Bad) else "not an object"
        raise BadTemplate(f"chat_template.json must be an object with the key 'chat_template', and is {reason}")
    return values.get("chat_template")


def _completed(message: Message) -> dict[str, Any]:
    """A message without keys that are null, and with its reasoning under all names that templates use."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[name] for name in REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def _compiled(source: str) -> jinja2.Template:
    template_sandbox.begin()  # constants are folded here
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise BadTemplate(f"the chat template cannot be read: {error.message} (line {error.lineno})") from error
    except Exception as error:  # nested too deeply, or a constant that cannot be computed
        raise BadTemplate(f"the chat template cannot be read: {type(error).__name__}: {error}") from error


def _environment() -> TemplateSandbox:
    made = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.bound("tojson", _json)
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return made


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant wrote, for masks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, in a scope of its own, between the values of two variables."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in _BLOCK)
        return nodes.Scope([begins, *body, ends], lineno=line)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
