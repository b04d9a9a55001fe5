"""Render one chat template, as a program of its own: a job comes as JSON on standard input.

It imports nothing of ours, and is started by `chat_templates`.
"""

import contextlib
import json
import sys
from datetime import datetime
from typing import Any


def render(job: dict[str, Any]) -> dict[str, str]:
    """Render the template of a job, with its variables and limits.

    Returns {"text": the rendered template}, or {"error": the reason why it failed}.
    """
    _limit_memory(job["memory"])
    try:
        return {"text": _generate(job)}
    except MemoryError:
        return {"error": f"it needs more than {job['memory'] >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # raised by Jinja or by the template itself
        return {"error": str(error) or type(error).__name__}


def _limit_memory(size_bytes: int) -> None:
    """Make allocations beyond a size fail, if the system supports it; otherwise only time is limited."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, maximum))


def _generate(job: dict[str, Any]) -> str:
    """Render a template in a sandbox and return the text."""
    sys.path.append(job["packages"])
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """Parse the tag `generation`, which templates put around answers; it changes no text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    pieces = []
    count = 0
    for piece in environment.from_string(job["template"]).generate(**job["variables"]):
        pieces.append(piece)
        count += len(piece)
        if count > job["characters"]:
            raise ValueError(f"it makes more than {job['characters']:,} characters")
    return "".join(pieces)


def main() -> None:
    """Render the job on standard input and write the result to standard output, both as JSON."""
    json.dump(render(json.load(sys.stdin)), sys.stdout)
