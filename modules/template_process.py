"""Render one chat template, as a separate program: a job comes as JSON on standard input.

It imports none of our modules, and is started by `chat_templates`.
"""

import contextlib
import json
import sys
from datetime import datetime
from typing import Any


def render(job: dict[str, Any]) -> dict[str, str]:
    """Render the template of a job with its variables, within the job's limits.

    Returns {"text": the rendered template}, or {"error": the reason why it failed}.
    """
    # limit the memory that this process can allocate, on systems that support it
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (job["memory"], maximum))
    try:
        return {"text": _generate(job)}
    except MemoryError:
        return {"error": f"it needs more than {job['memory'] >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # raised by Jinja or by the template itself
        return {"error": str(error) or type(error).__name__}


def _generate(job: dict[str, Any]) -> str:
    """Render the template of a job in a sandbox and return the text."""
    sys.path.append(job["packages"])
    environment = _make_environment()
    pieces = []
    num_characters = 0
    for piece in environment.from_string(job["template"]).generate(**job["variables"]):
        pieces.append(piece)
        num_characters += len(piece)
        if num_characters > job["characters"]:
            raise ValueError(f"it makes more than {job['characters']:,} characters")
    return "".join(pieces)


def _make_environment() -> Any:
    """Return Jinja's sandbox with the tags, filters and functions that chat templates may use."""
    import jinja2.ext  # found in the folder of the job
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """Accepts the tag `generation`, which chat templates put around answers, without any effect."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _format_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise_template_error(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _format_now(format: str) -> str:
    return datetime.now().strftime(format)


def main() -> None:
    """Render the job (JSON on standard input) and write the result as JSON to standard output."""
    json.dump(render(json.load(sys.stdin)), sys.stdout)
