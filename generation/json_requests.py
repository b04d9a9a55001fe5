"""Take prompts from another program, a JSON object on each line of standard input, and answer in JSON.

The browser drives a process of --interactive this way, so that its model stays loaded. The environment
variable `modules.installation.DRIVEN` asks for it, and names the folder for previews. A request:

    {"prompt": "a cat", "options": {"video_size_width": "832", "control_image_path": ["a.png", "b.png"]},
     "strengths": {"": ["0.8"]}}

Options are those of a prompt line, by letter or name, with values as text, so that no prompt is taken for
options. Strengths are those of the LoRAs, by expert. Each answer is an object with `event`:

ready: the next request can be read. begun: with the number of steps. phase: with what begins now. step: with
the steps done so far. warned: with a warning of the script. made: with the file. failed: with the reason.
cancelled: by SIGINT.

Answers go to the original standard output; everything else that is printed goes to standard error.
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from generation.making import make_outputs
from generation.prompt_lines import find_option, store_value
from generation.request import GenerationRun, make_job
from modules.devices import Failures
from modules.errors import OptionError
from protocols.steps import CompletedStep

LABEL = "the prompt"
PREVIEW_EVERY = 2  # steps between previews; a late one is skipped
ChangeLoras = Callable[[GenerationRun, Mapping[str, Sequence[float]], Sequence[str] | None], GenerationRun]


class Interrupts:
    """Handles SIGINT: ends the current request, but never the process or an event that is being written."""

    def __init__(self) -> None:
        self._may_raise = False
        self._is_held = False
        self._has_come = False
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, _: int, __: FrameType | None) -> None:
        if not self._may_raise:
            return
        if self._is_held:
            self._has_come = True
            return
        self._may_raise = False  # the cleanup after an interrupted request is not interrupted
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let SIGINT raise one KeyboardInterrupt inside the `with` block."""
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Delay a KeyboardInterrupt until the end of the `with` block."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._has_come:
            self._has_come = False
            self._may_raise = False
            raise KeyboardInterrupt


class Answers:
    """Writes events as lines of JSON to the process's original standard output."""

    def __init__(self, stream: TextIOWrapper, interrupts: Interrupts) -> None:
        self._stream = stream
        self._interrupts = interrupts

    def send(self, event: str, **facts: Any) -> None:
        """Write an event with its facts as one line of JSON.

        Raises:
            BrokenPipeError: If the reader has closed the pipe.
        """
        with self._interrupts.delayed():
            self._stream.write(json.dumps({"event": event, **facts}) + "\n")
            self._stream.flush()


class _WarningSender(logging.Handler):
    """Log handler that sends each distinct warning once as an event."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(logging.WARNING)
        self._answers = answers
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._told:
            self._told.add(text)
            self._answers.send("warned", text=text)


@contextlib.contextmanager
def send_warnings(answers: Answers) -> Iterator[None]:
    """Send warnings logged inside the `with` block as events."""
    handler = _WarningSender(answers)
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


def open_answers() -> TextIOWrapper:
    """Return a stream to the original standard output, and redirect later prints to standard error."""
    sys.stdout.flush()
    stream = TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    return stream


def serve_requests(run: GenerationRun, change_loras: ChangeLoras, preview_folder: Path) -> None:
    """Serve requests one after the other until the end of standard input.

    Args:
        run: The run.
        change_loras: Returns a run with other LoRA strengths, also of blocks.
        preview_folder: Folder for previews; it does not have to exist.
    """
    interrupts = Interrupts()
    typed_blocks = run.options.lora_patterns.lora_blocks  # for requests without lora_blocks
    with contextlib.closing(open_answers()) as stream:
        answers = Answers(stream, interrupts)
        answers.send("ready")
        for line in sys.stdin:
            failures = Failures()
            try:
                with (
                    interrupts.allowed(),
                    # a broken pipe ends the loop: nobody reads the answers any longer
                    failures.collect_errors(LABEL, (*run.fatal, BrokenPipeError)),
                    send_warnings(answers),
                ):
                    request = read_request(line, run)
                    run = change_loras(
                        run, request.strengths, request.values.get("lora_blocks", typed_blocks)
                    )
                    _serve(with_previews(run, preview_folder), request.values, answers, failures)
            except KeyboardInterrupt:
                answers.send("cancelled")
            if failures.reasons:
                answers.send("failed", reason=failures.reasons[LABEL])
            answers.send("ready")


def with_previews(run: GenerationRun, folder: Path) -> GenerationRun:
    """Return the run with latent previews written to a folder.

    The run is returned unchanged if its latents have no preview, or if a tool hides content.
    """
    hides_content = run.post is not None and run.post.hides_content
    if run.previews is not None:
        return replace(run, previews=replace(run.previews, folder=folder))
    if hides_content or not run.family.latent.preview_factors:
        return run
    from blissful_tuner.latent_preview import LatentPreviews  # only from the browser

    previews = LatentPreviews(
        every=PREVIEW_EVERY,
        folder=folder,
        latent=run.family.latent,
        device=run.session.device,
        has_room=run.session.dits.can_stay,
    )
    return replace(run, previews=previews)


def _serve(run: GenerationRun, values: Mapping[str, Any], answers: Answers, failures: Failures) -> None:
    """Generate a request and send its progress and files as events; raises UserError if it fails."""
    job = make_job(run, LABEL, values)
    answers.send("begun", steps=job.prepared.num_steps)
    counter = itertools.count(1)  # continues over the sections of a video

    def report_step(step: CompletedStep) -> bool:
        # a family's own solver decides the number of steps itself
        changed_total = {} if step.section.solver is None else {"steps": step.step.num_steps}
        answers.send("step", done=next(counter), **changed_total)
        return False  # denoising continues

    def report_phase(phase: str) -> None:
        answers.send("phase", what=phase)

    watched_run = replace(run, watchers=[report_step], on_phase=report_phase)
    for path in make_outputs(watched_run, [job], failures).values():
        answers.send("made", file=str(path.absolute()))


class DrivenRequest(NamedTuple):
    """Request from the browser: the values of a prompt line, and the LoRA strengths of each expert."""

    values: Mapping[str, Any]
    strengths: Mapping[str, Sequence[float]]


def read_request(line: str, run: GenerationRun) -> DrivenRequest:
    """Parse a JSON object with the prompt, its options and LoRA strengths.

    Raises:
        OptionError: If the line cannot be parsed.
    """
    try:
        request = json.loads(line)
        prompt = str(request["prompt"]).strip()
        options = dict(request["options"])
        strengths = {
            str(expert): [float(number) for number in numbers]
            for expert, numbers in dict(request.get("strengths", {})).items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(f"a request is a JSON object with prompt and options: {error}") from None
    values: dict[str, Any] = {"prompt": prompt}
    for name, value in options.items():
        option = find_option(name, run.options.line_options)
        if option is None:
            raise OptionError(f"this script has no option --{name} for a prompt")
        for item in value if isinstance(value, list) else [value]:
            try:
                store_value(values, option, option.read(str(item)))
            except ValueError as error:
                raise OptionError(f"--{name}: {error}") from None
    return DrivenRequest(values, strengths)
