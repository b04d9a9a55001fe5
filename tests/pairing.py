"""Set single options of a toy's training to other values, and see which of a run's consumers notice.

What one option does in its script is the matter of `tests.sweeping`, whose values are taken here. A probe is
a training of some tenths of a second.
"""

import argparse
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState

from modules.errors import UserError
from modules.installation import find_script
from modules.option_tables import find_table
from modules.options import find_rejection
from modules.table_parser import build_parser
from tests.commands import MAX_SECONDS, ROOT, start_processes
from tests.option_settings import SETTINGS
from tests.sweeping import LINES, SLIDER, Setting, Variation, info_of_option, vary
from tests.training import toy, toy_images
from training.run_end import EndedRun, get_exit_code
from training.validation import Validation

USED, WITHOUT, REFUSED = "used", "without effect", "refused"
# what an ended run tells the command of --on_end; set for the whole run
BASE = (
    *("--validation_split", "0.4", "--validate_every_n_steps", "2", "--max_train_steps", "4"),
    *("--sample_prompts", "prompts.txt", "--sample_at_first", "--on_end", "true", "--save_state"),
)
_PLAIN = frozenset({"ss_training_started_at", "ss_training_finished_at", "modelspec.date", "ss_session_id"})
_UNSTABLE = _PLAIN | {"ss_ss_session_id", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}


@dataclass
class Seen:
    """What the consumers of a training had from it."""

    losses: list[float] = field(default_factory=list)  # of its validations
    end: dict[str, str] = field(default_factory=dict)  # what --on_end was told
    texts: dict[str, str] = field(default_factory=dict)  # metadata of the file
    samples: dict[str, str] = field(default_factory=dict)  # of those before the first step
    log: str = ""
    refusal: str = ""  # why it did not train


def training_options() -> dict[str, argparse.Action]:
    """The options of the toy's training, by name."""
    actions = toy.toy_parser(False)._actions
    return {one.dest: one for one in actions if not hasattr(one, "rejection") and one.dest != "help"}


def write_files(folder: Path) -> None:
    """Write what the values of options name, and a state to resume from."""
    toy.write_caches(folder)
    toy.write_prompts(folder)
    for name in LINES:
        (folder / name).write_text("a dog --f 1 --s 2 --d 1\n", encoding="utf-8")
    (folder / "options.toml").write_text("network_alpha = 2\n", encoding="utf-8")
    (folder / "slider.toml").write_text(SLIDER, encoding="utf-8")
    (folder / "junk.bin").write_text("junk", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "end.py").write_text("", encoding="utf-8")
    toy.train_toy(folder, "--output_dir", "given", "--max_train_steps", 2)


@contextmanager
def _fresh_process() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def probe(words: Sequence[str], output: str) -> Seen:
    """Train the toy in the working folder with these words into a folder of this name."""
    seen, log = Seen(), _Log()
    measure = Validation.measure

    def measured(validation: Validation, *given: Any) -> dict[str, float]:
        losses = measure(validation, *given)
        seen.losses += losses.values()
        return losses

    def ended(option: str, argv: Sequence[str], run: EndedRun, error: BaseException | None, **_: Any) -> None:
        place = {"folder": str(run.folder), "name": run.name, "steps": str(run.steps), "step": str(run.step)}
        seen.end = {**place, "finished": str(run.is_finished), "code": str(get_exit_code(error))}

    with (
        patch.object(Validation, "measure", measured),
        patch("training.run_end.start_command", ended),
        log.kept(),
        _fresh_process(),
    ):
        try:
            toy.train_toy(Path(), "--output_dir", output, *words)
        except UserError as error:
            seen.refusal = str(error)
        except SystemExit as error:
            seen.refusal = f"exit {error.code}"
    seen.log = "\n".join(log.lines)
    folder = Path(seen.end.get("folder", output))
    file = folder / f"{seen.end.get('name', 'x')}.safetensors"
    if file.is_file() and not seen.refusal:
        seen.texts = {k: v for k, v in toy.metadata_of(file).items() if k not in _UNSTABLE}
    for path in sorted((folder / "sample").glob("*")):
        if path.is_file():
            seen.samples[re.sub(r"\d{14}", "TIME", path.name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    if seen.end.get("folder") == output:
        seen.end["folder"] = ""
    return seen


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @contextmanager
    def kept(self) -> Iterator[None]:
        logging.getLogger().addHandler(self)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(self)


def observe(variation: Variation, plain: Seen, state: Path, output: str) -> dict[str, str]:
    """Return the cells of an option that has another value; {} if the toy refuses it.

    Args:
        variation: The option's other value.
        plain: What the run without it left.
        state: The state of that run.
        output: Name of a new folder.
    """
    changed = probe(variation.words, output)
    if changed.refusal:
        return {}
    resumed = probe((*variation.words, "--resume", str(state), "--max_train_steps", "5"), f"{output}r")
    is_told = any(f"{flag} was " in resumed.log for flag in variation.flags)
    cells = {
        "validation": plain.losses[:1] != changed.losses[:1],
        "best": len(plain.losses) != len(changed.losses) or plain.end.get("step") != changed.end.get("step"),
        "on_end": plain.end != changed.end,
        "metadata": plain.texts != changed.texts,
        "samples": plain.samples != changed.samples,
    }
    observed = {name: USED if is_used else WITHOUT for name, is_used in cells.items()}
    observed["resume"] = REFUSED if resumed.refusal else USED if is_told else WITHOUT
    return observed


@dataclass
class Trials:
    """Trainings of the toy in the working folder, whose plain runs are kept."""

    plain: dict[tuple[str, ...], tuple[Seen, Path]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def cells(self, name: str) -> dict[str, str]:
        """Return the cells of an option, {} if the toy cannot have it."""
        action = training_options()[name]
        variation = vary(BASE, action, info_of_option(action), SETTINGS.get(name, Setting()))
        if variation.plain not in self.plain:
            output = f"plain{next(self.numbers)}"
            self.plain[variation.plain] = probe(variation.plain, output), Path(output, "x-state")
        plain, state = self.plain[variation.plain]
        return {} if plain.refusal else observe(variation, plain, state, f"other{next(self.numbers)}")


IMAGE_BASE = ("--max_train_steps", "2", "--network_train_unet_only")
IMAGE_SCRIPT = "flux_train_network.py"
CACHED, LIVE, SUBSETS = "cached", "live", "subsets"  # folders of pictures, and columns


def script_options(script: str) -> dict[str, argparse.Action]:
    """The options that a script takes, by name."""
    table = find_table(find_script(script))
    assert table is not None, script
    actions = build_parser(table, script)._actions
    return {one.dest: one for one in actions if find_rejection(one) is None and one.dest != "help"}


def write_image_folders(folder: Path) -> None:
    """Write pictures with cached texts, with texts that are encoded in each step, and as a subset."""
    toy_images.write_images(folder / CACHED, texts=True)
    toy_images.write_images(folder / LIVE)
    toy_images.write_subset(folder / SUBSETS, "")


def image_cells(name: str, folder: Path) -> dict[str, str]:
    """Return whether an option goes with live texts and with subsets; {} if the toy cannot have it at all."""
    action = script_options(IMAGE_SCRIPT)[name]
    variation = vary(IMAGE_BASE, action, info_of_option(action), SETTINGS.get(name, Setting()))
    refusals = {}
    for layout in (CACHED, LIVE, SUBSETS):
        try:
            with _fresh_process():
                toy_images.train_image_toy(folder / layout, *variation.words)
        except UserError as error:
            if "Make it again with" not in str(error):  # else the caches have to be others
                refusals[layout] = str(error)
        except SystemExit as error:
            refusals[layout] = f"exit {error.code}"
        if CACHED in refusals:
            return {}
    return {layout: REFUSED if layout in refusals else USED for layout in (LIVE, SUBSETS)}


TOY_SCRIPT = "tests/training/train_toy.py"


def refusal_of_processes(name: str, folder: Path) -> str:
    """Return why two processes refuse an option that one takes; "" if they train with it."""
    action = training_options()[name]
    variation = vary(BASE, action, info_of_option(action), SETTINGS.get(name, Setting()))
    command = [str(ROOT / TOY_SCRIPT), str(folder), *variation.words, "--output_dir", f"several {name}"]
    with start_processes([command] * 2, folder) as started:
        for process in started:
            process.wait(timeout=MAX_SECONDS)
        done = [process.done() for process in started]
    return "" if not any(one.returncode for one in done) else done[0].stderr or done[1].stderr
