"""Chat templates are rendered as transformers renders them."""

from __future__ import annotations

import pytest

from halfbyte.engines.llamacpp.model import render
from tests.tiny_models import CHAT_TEMPLATE

QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- messages[0]['content'] }}\n{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content }}\n"
    "    {{- '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [QWEN, LLAMA, CHAT_TEMPLATE, "{{ messages | tojson }} {{ tools is none }}"])
def test_same_text_as_transformers(template, tokenizers_by_style):
    tokenizer = tokenizers_by_style("llama-bpe")
    messages = [{"role": "user", "content": "Größe <b> & 'x'?"}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    got = render(template, messages[0]["content"], bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    assert got == expected


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[5].content.x }}"])
def test_a_broken_template_gives_none(template):
    assert render(template, "hello", bos="", eos="") is None


def test_a_template_cannot_reach_the_machine():
    assert render("{{ ''.__class__.__mro__[1].__subclasses__() }}", "x", bos="", eos="") is None
