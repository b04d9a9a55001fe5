"""Take prompts from another program, a JSON object on each line of standard input, and answer in JSON.

The browser drives a process of --interactive this way, so that its model stays loaded: the environment
variable `modules.installation.DRIVEN` asks for it. A request:

    {"prompt": "a cat", "options": {"w": "832", "h": "480", "ci": ["a.png", "b.png"]}}

Options are those of a prompt line, with their texts, so that no prompt is taken for options. Each answer is
an object with `event`:

ready: the next request can be read. begun: with the number of steps. step: with the steps done so far.
made: with the file. failed: with the reason. cancelled: by SIGINT.
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from contract.steps import StepDone
from generation.making import make_outputs
from generation.prompt_lines import find_option, store
from generation.request import GenerationRun, make_job
from modules.devices import Failures
from modules.errors import OptionError

logger = logging.getLogger(__name__)

LABEL = "the prompt"
STRENGTHS = "m"  # option of a request: strengths of the LoRAs, separated by commas


def tell(event: str, **facts: Any) -> None:
    """Write an answer. Raises BrokenPipeError if nobody reads it any more."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def serve_requests(
    run: GenerationRun, change_strengths: Callable[[GenerationRun, str | None], GenerationRun]
) -> None:
    """Make one request after the other, until the end of standard input.

    change_strengths: returns a run with other strengths of its LoRAs.
    """
    tell("ready")
    for line in sys.stdin:
        failures = Failures()
        try:
            with failures.note_errors(LABEL, run.fatal):
                run = _serve(run, line, change_strengths, failures)
        except KeyboardInterrupt:
            tell("cancelled")
        if failures.reasons:
            tell("failed", reason=failures.reasons[LABEL])
        tell("ready")


def _serve(
    run: GenerationRun,
    line: str,
    change_strengths: Callable[[GenerationRun, str | None], GenerationRun],
    failures: Failures,
) -> GenerationRun:
    """Make the request of a line; return the run with its strengths. Raises UserError if that fails."""
    values, strengths = read_request(line, run)
    run = change_strengths(run, strengths)
    job = make_job(run, LABEL, values)
    tell("begun", steps=job.prepared.num_steps)
    done = 0

    def tell_step(_: StepDone) -> bool:
        nonlocal done
        done += 1
        tell("step", done=done)
        return False

    clips = make_outputs(replace(run, watchers=[tell_step]), [job], failures)
    for path in clips.values():
        tell("made", file=str(path.absolute()))
    return run


def read_request(line: str, run: GenerationRun) -> tuple[dict[str, Any], str | None]:
    """Return the values of a request as those of a prompt line, and the strengths of its LoRAs.

    Raises OptionError if it cannot be read.
    """
    try:
        request = json.loads(line)
        prompt = request["prompt"]
        options = dict(request["options"])
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(f"a request is a JSON object with prompt and options: {error}") from None
    strengths = options.pop(STRENGTHS, None)
    values: dict[str, Any] = {"prompt": str(prompt).strip()}
    for word, texts in options.items():
        option = find_option(word, run.options.line_options)
        if option is None:
            raise OptionError(f"this script has no option --{word} for a prompt")
        for text in texts if isinstance(texts, list) else [texts]:
            try:
                store(values, option, option.read(str(text)))
            except ValueError as error:
                raise OptionError(f"--{word}: {error}") from None
    return values, strengths
