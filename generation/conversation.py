"""Generate the prompts that a user types at the console, one after the other (--interactive)."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from generation.asking import line_reader, ring_after
from generation.making import make_outputs
from generation.prompt_lines import is_blank
from generation.request import GenerationRun, make_job
from modules.devices import Failures
from modules.errors import OptionError
from runtime.offload.joining import have_joined

logger = logging.getLogger(__name__)

STRENGTHS = "lora_strengths"  # key of a line's option for the strengths of the LoRAs
ChangeLoras = Callable[[GenerationRun, Mapping[str, Sequence[float]], Sequence[str] | None], GenerationRun]


@dataclass
class _Conversation:
    """State of --interactive that is kept from one typed line to the next."""

    run: GenerationRun  # with the latest strengths of the LoRAs
    change_loras: ChangeLoras
    lora_blocks: Sequence[str] | None  # of the command line, for lines without --lb
    remembered: dict[str, Any] = field(default_factory=dict)  # options of earlier lines, by key

    def generate_line(self, line: str, failures: Failures) -> None:
        """Generate the output that a line typed by the user asks for, or its sheet with --sheet."""
        if self.run.options.sheet.sheet is not None:
            from generation.sheets import make_sheets  # only with --sheet

            make_sheets(self.run, {"the prompt": line}, failures)
            return
        values = dict(self.run.read_line(line))
        if self.run.options.remembers_lines:
            values = {**self.remembered, **values}
        strengths: dict[str, Sequence[float]] = {}
        if values.get(STRENGTHS) is not None:
            # Parse LoRA strengths typed by the user: numbers separated by commas, one for each LoRA
            text = values[STRENGTHS]
            try:
                numbers = tuple(float(number) for number in text.split(","))
            except ValueError:
                raise OptionError(f"--m {text}: use numbers separated by commas, such as 1,0.5") from None
            count = len(self.run.options.lora.lora_weight or ())
            if len(numbers) != count:
                raise OptionError(f"--m {text}: there are {count} LoRAs. Use a number for each")
            strengths[""] = numbers  # "" is the only or low-noise expert
        blocks = values.get("lora_blocks")
        self.run = self.change_loras(self.run, strengths, self.lora_blocks if blocks is None else blocks)
        job = make_job(self.run, "the prompt", values)
        self.remembered = values  # set after `make_job`, so that an invalid line changes nothing
        make_outputs(self.run, [job], failures)


def converse(run: GenerationRun, change_loras: ChangeLoras) -> None:
    """Read prompts from the console until the end of input. Ctrl-C cancels the current prompt.

    Args:
        run: The run.
        change_loras: Returns a run with other LoRA strengths, also of blocks.
    """
    remembers = run.options.remembers_lines  # options of a line apply to the lines after it
    ask = line_reader(
        ((character, option.key) for character, option in run.options.line_options.items()),
        " Options apply to the prompts that follow; an empty line quits." if remembers else "",
    )
    is_shared = have_joined()  # several processes generate each prompt together
    if is_shared:
        from generation.multi_process import read_together  # only with several processes

        ask = read_together(ask)
    conversation = _Conversation(run, change_loras, run.options.lora_patterns.lora_blocks)
    while True:
        try:
            line = ask()
            if remembers and not line.strip():
                return
            if is_blank(line):
                continue
            failures = Failures()
            with ring_after(run.options.output.bell), failures.collect_errors("the prompt", run.fatal):
                conversation.generate_line(line, failures)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            if is_shared:  # the other processes are still generating the prompt and cannot be cancelled
                raise
            sys.stdout.write("\n")
            logger.warning("The prompt is cancelled. quit or Ctrl-D ends.")
