"""Render the chat template in a model's folder, with limits on time, memory and characters.

A template is a program in Jinja, and comes from whoever made the folder. Its sandbox keeps it from reaching
anything, but not from running forever, so it runs in a separate process, which is stopped. Templates
may use what transformers' `apply_chat_template` gives them.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.control_codes import shorten
from modules.errors import InstallationError
from modules.limits import MAX_TEMPLATE_CHARACTERS, MAX_TEMPLATE_MEMORY, MAX_TEMPLATE_SECONDS

RENDER_SCRIPT = Path(__file__).with_name("template_process.py")
BOOTSTRAP_CODE = "import runpy, sys; runpy.run_path(sys.argv[1])['main']()"  # by path: imports no package


class TemplateError(Exception):
    """Raised if a chat template fails or does not end; the message is the reason."""


def render_chat(
    tokenizer: Any,
    template: Any,
    turns: Sequence[Mapping[str, Any]],
    seconds: float = MAX_TEMPLATE_SECONDS,
    **more: Any,
) -> str:
    """Return a conversation as text that the model continues, rendered with its chat template.

    `tokenizer` is a tokenizer of transformers, whose special tokens the template may use. `template` is the
    template's text, or a mapping with an entry "default"; None takes the tokenizer's template. `turns` have a
    `role` and a `content` each. Rendering is stopped after `seconds`. `more` are additional variables.

    Raises:
        TemplateError: If the template fails or exceeds a limit.
    """
    if template is None:
        template = tokenizer.get_chat_template()
    if isinstance(template, Mapping):
        if "default" not in template:
            raise TemplateError(f"it has {', '.join(map(str, template)) or 'none'}, but none called default")
        template = template["default"]
    variables: dict[str, Any] = {}
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            variables[name] = str(token)
    variables |= {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True}
    variables |= more
    return _render(str(template), json.dumps(variables), seconds)


@functools.lru_cache(maxsize=1024)  # most items of a dataset have the same prompt
def _render(template: str, variables_json: str, seconds: float) -> str:
    """Return a rendered template; a separate process with bounds on memory, time and length renders it."""
    # The variables are JSON, because the arguments of a cached function have to be hashable.
    spec = importlib.util.find_spec("jinja2")
    if spec is None or spec.origin is None:
        raise InstallationError("chat templates need the package jinja2. Run: pip install jinja2")
    job = {
        "template": template,
        "variables": json.loads(variables_json),
        "packages": str(Path(spec.origin).parent.parent),
        "characters": MAX_TEMPLATE_CHARACTERS,
        "memory": MAX_TEMPLATE_MEMORY,
    }
    try:
        completed = subprocess.run(
            # isolated: nothing is imported from the working folder
            [sys.executable, "-I", "-X", "utf8", "-c", BOOTSTRAP_CODE, str(RENDER_SCRIPT)],
            input=json.dumps(job).encode("ascii"),
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(f"it does not end within {seconds:g} seconds") from None
    try:
        answer = json.loads(completed.stdout)
    except ValueError:
        last_line = completed.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise TemplateError(
            f"its process ended with {completed.returncode}: {shorten(last_line, 200)}"
        ) from None
    if "error" in answer:
        raise TemplateError(shorten(str(answer["error"]), 200))
    return str(answer["text"])
