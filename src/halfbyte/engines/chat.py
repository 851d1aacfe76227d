"""Put a prompt into a model's chat template, as transformers does: Jinja in a sandbox, trimmed blocks.

llama.cpp's C function knows some templates by their looks and writes the turn itself, without the default system turn
that a template may add; rendered here, every engine sees the same prompt.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(template: str, prompt: str, *, bos: str, eos: str) -> str | None:
    """``prompt`` as a user's turn, followed by the start of the assistant's; None if the template fails.

    Args:
        template: Jinja source, from ``tokenizer.chat_template``.
        bos, eos: the text of these tokens, for templates that write them.
    """

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    values: dict[str, Any] = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, "tools": None}
    try:
        return environment.from_string(template).render(messages=[{"role": "user", "content": prompt}], **values)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # whatever a template's author got wrong
        return None
