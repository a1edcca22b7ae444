"""Chat templates, run in jinja2's immutable sandbox: they are programs of strangers."""

import datetime
import json
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lclm.errors import LclmError


def _refuse(text: str) -> None:
    raise jinja2.TemplateError(text)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
        form
    )
    return environment


def render_chat(
    template: str | None,
    messages: list[dict[str, Any]],
    *,
    names: dict[str, str],
    add_generation_prompt: bool,
) -> str:
    """The prompt text for `messages`, each a dict with `role` and `content`.

    `names` are the special tokens a template may print. Raises `LclmError` for a
    missing or broken template, or messages that it refuses.
    """
    if template is None:
        raise LclmError(
            "this model has no chat template: build the prompt as plain text, or put "
            "a chat_template.jinja beside its config.json"
        )
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise LclmError(
                f"chat message {message!r}: each needs 'role' and 'content', as in "
                "{'role': 'user', 'content': 'Hello'}"
            )
    try:
        compiled = _environment().from_string(template)
        return compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **names
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise LclmError(f"the chat template refused the messages: {error}") from error
