"""Chat templates give the text that transformers gives, and end."""

import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from modules.chat_templates import TemplateError, render_chat
from tests.encoders.test_language_models import QWEN3_TEMPLATE, tiny_tokenizer
from tests.waiting import PATIENCE

TURNS = [{"role": "system", "content": "be short"}, {"role": "user", "content": "a cat ü\n'\" {{ 1 }}"}]
TEMPLATES = {
    "qwen": QWEN3_TEMPLATE,
    "tokens": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "tags": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}\n"
    "  {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "asked": "{% if add_generation_prompt %}A:{% endif %}{{ enable_thinking }}{{ tools }}{{ nothing }}",
}


def tokenizer(template: Any = None) -> Any:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), chat_template=template, **tokens)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_gives_what_transformers_gives(template: str) -> None:
    known = tokenizer(template)
    how = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    expected = known.apply_chat_template(TURNS, **how)
    assert render_chat(known, None, TURNS, enable_thinking=False) == expected
    assert render_chat(known, {"default": template}, TURNS, enable_thinking=False) == expected


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
HOSTILE = [
    ("{{ 'a' * 10**11 }}", "needs more than 1024 MiB of memory"),
    ("{{ '%1000000000000d' % 1 }}", "memory"),
    (
        "{% set x = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
        "memory",
    ),
    ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "makes more than 1,048,576 characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("{{ raise_exception('no system') }}", "no system"),
    ("{% if %}", "Expected an expression"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include 'x' %}", "no loader"),
]


@pytest.mark.parametrize(("template", "told"), HOSTILE)
def test_a_template_that_fails_or_grows_says_why(template: str, told: str) -> None:
    with pytest.raises(TemplateError, match=told):
        render_chat(tokenizer(), template, TURNS)


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10 ** (10 ** 8) }}"])
def test_a_template_without_end_is_stopped(template: str) -> None:
    begin = time.monotonic()
    with pytest.raises(TemplateError, match="does not end within 2 seconds|memory"):
        render_chat(tokenizer(), template, TURNS, seconds=2.0)
    assert time.monotonic() - begin < PATIENCE


def test_nothing_of_the_working_folder_is_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2", "json", "markupsafe"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert render_chat(tokenizer(), "x {{ messages[0].role }}", TURNS) == "x system"
    assert not (tmp_path / "ran").exists()


def test_a_mapping_without_a_default_is_refused() -> None:
    with pytest.raises(TemplateError, match="it has tool_use, but none called default"):
        render_chat(tokenizer(), {"tool_use": "x"}, TURNS)
