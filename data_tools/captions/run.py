"""Run tools/caption_dataset.py after its options are read: name missing parts, write or edit captions."""

import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.captions.answers import Answerer, Frames, NoCaptionError
from data_tools.captions.editing import edit_captions
from data_tools.captions.lists import CaptionList, line_key
from data_tools.captions.local_model import load_model
from data_tools.captions.looking import look_at
from data_tools.captions.options import CaptioningOptions, WordingOptions
from data_tools.captions.places import find_places
from data_tools.captions.planning import (
    FOREIGN,
    OURS,
    CaptionJob,
    CaptionPlan,
    needs_texts,
    pass_of,
    plan_captions,
    read_made,
)
from data_tools.captions.server import make_server
from data_tools.captions.wording import reword
from data_tools.captions.writing import CaptionWriter
from dataset.caching.reports import Failure
from dataset.config import DatasetConfig
from dataset.sources.fetching import fetch
from modules.bars import Bar
from modules.console import Row, count_of, in_words, show_box
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, MediaError, OptionError, UserError

logger = logging.getLogger(__name__)

LISTED = 50  # of what is missing, and of what failed
GIVE_UP = 20  # failures without one caption, after which something else is wrong than the files
SERVER_GONE = 5  # images or clips in a row for which a server failed again and again


def run_captioning(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Do the options' work. Raises UserError if something cannot be used, or failed at last."""
    _refuse_doubling(config, options.wording)
    if options.edit_only:
        if not options.dry_run:
            _recover_lists(config)
        edit_captions(config, options.wording, options.dry_run)
    elif options.dry_run:
        _say_plan(config, options)
    else:
        write_captions(config, options)


def write_captions(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Write the captions of a dataset that are missing, or all that the options name.

    The model is loaded only if there is something to write. Each caption is written as soon as it is made, so
    the same command goes on after a kill. Raises DatasetError if the dataset cannot be used, and at the end
    if there are sources without a caption.
    """
    start = time.monotonic()
    lists = _recover_lists(config)
    places = find_places(config, needs_texts(options))
    made = read_made(places.all)
    plan = plan_captions(places.all, made, options)
    writer = CaptionWriter(made, lists)
    run = _Run(options, writer)
    is_again = options.overwrite or options.overwrite_all
    rows: list[Row] = [
        ("data", str(config.path)),
        ("captions", _counts(plan)),
        ("made by", _engine_name(options)),
    ]
    show_box("Captioning", rows)
    for text in places.say_missing_keys():
        logger.warning("%s", text)
    if plan.jobs:
        answerer = _make_answerer(options)
        try:
            for folder in made.values() if is_again else ():
                folder.begin_pass(pass_of(options))
            run.make(plan.jobs, answerer)
        finally:
            writer.close()
    # with failures the pass goes on: the same command tries these again, not all
    for folder in made.values() if is_again and not run.failures else ():
        folder.end_pass()
    _conclude(run, plan, start)


@dataclass
class _Run:
    """Captions that are being made."""

    options: CaptioningOptions
    writer: CaptionWriter
    failures: list[Failure] = field(default_factory=list)
    _num_answers: int = 0
    _num_failed: int = 0  # though their files can be read
    _server_failed: int = 0  # in a row

    def make(self, jobs: Sequence[CaptionJob], answerer: Answerer) -> None:
        """Have captions made, and write each one as it comes."""
        answers = answerer(jobs, self._look)
        with contextlib.closing(answers), Bar(len(jobs), "captions", unit="caption") as bar:
            for job, answer in answers:
                if isinstance(answer, str):
                    self._write(job, answer)
                elif isinstance(answer, (MediaError, NoCaptionError)):
                    self._fail(job, answer)
                else:
                    raise answer
                bar.update()

    def _look(self, job: CaptionJob) -> Frames:
        ask, source = self.options.ask, job.place.source
        media = replace(source, control=(), mask=None, origins=source.origins[:1])
        with fetch(media) as fetched:
            return look_at(fetched.path, source.table.kind == "image", ask.num_frames, ask.max_pixels)

    def _write(self, job: CaptionJob, answer: str) -> None:
        self._num_answers, self._server_failed = self._num_answers + 1, 0
        caption = reword(answer, self.options.wording)
        if caption:
            self.writer.write(job, caption)
        else:
            self._fail(job, NoCaptionError(f"--replace leaves nothing of the answer {answer!r}"))

    def _fail(self, job: CaptionJob, error: Exception) -> None:
        self.failures.append(Failure.of(job.place.source, error))
        logger.warning("%s", self.failures[-1])
        if not isinstance(error, NoCaptionError):
            return
        self._num_failed += 1
        self._server_failed = self._server_failed + 1 if error.server_failed else 0
        if self._server_failed == SERVER_GONE:
            raise UserError(
                f"The server fails again and again: {error}. What is written stays: run again later."
            )
        if not self._num_answers and self._num_failed == GIVE_UP:
            raise UserError(
                f"None of the first {GIVE_UP} got a caption, the last one because {error}. Nothing more is "
                "tried. Try another model, or other options."
            )


def _make_answerer(options: CaptioningOptions) -> Answerer:
    if options.api.api_base is not None:
        return make_server(options.api, options.ask).answer
    return load_model(options.model, options.ask).answer


def _engine_name(options: CaptioningOptions) -> str:
    api = options.api
    return str(options.model.model) if api.api_base is None else f"{api.api_model} at {api.api_base}"


def _open_lists(config: DatasetConfig) -> dict[Path, CaptionList]:
    return {
        table.jsonl_file: CaptionList(table.jsonl_file, f"{table.kind}_path")
        for table in config.datasets
        if table.jsonl_file is not None
    }


def _recover_lists(config: DatasetConfig) -> dict[Path, CaptionList]:
    """Put leftovers of a killed run into the lists."""
    lists = _open_lists(config)
    for one in lists.values():
        one.merge()
    return lists


def _refuse_doubling(config: DatasetConfig, wording: WordingOptions) -> None:
    """Raise OptionError if a table puts the same text around its captions: it would be there twice."""
    for table in config.datasets:
        for name in ("caption_prefix", "caption_suffix"):
            text = getattr(wording, name).strip()
            if text and getattr(table, name) == text:
                raise OptionError(
                    f"--{name} {text!r}: {table.name} has {name} = {text!r}, which does this without "
                    "touching files; it would be there twice. Leave out one of the two."
                )


def _counts(plan: CaptionPlan) -> str:
    parts = [f"{len(plan.jobs)} to make", f"{plan.num_kept} kept"]
    again, foreign = plan.count(OURS), plan.count(FOREIGN)
    parts += [f"{again} of these anew"] if again else []
    parts += [f"{foreign} of these in place of hand-written ones, which become .bak"] if foreign else []
    parts += [f"{plan.num_done_before} made anew by the run before"] if plan.num_done_before else []
    return ", ".join(parts)


def _say_plan(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Print which captions would be made, and where they would be written."""
    lists = _open_lists(config)
    places = find_places(config, needs_texts(options))
    plan = plan_captions(places.all, read_made(places.all), options)
    waiting = {(path, key) for path, one in lists.items() for key in one.waiting}
    jobs = [job for job in plan.jobs if (job.place.file, line_key(job.place.entry or "")) not in waiting]
    lines = [f"{count_of(len(jobs), 'caption')} would be made, {plan.num_kept} are kept. Nothing is written."]
    lines += [f"  {job.path} ({job.why}): {job.place}" for job in jobs[:LISTED]]
    lines += [f"  ... and {len(jobs) - LISTED} more"] if len(jobs) > LISTED else []
    if waiting:
        lines.append(f"{len(waiting)} that an interrupted run made would be put into their lists.")
    _say([*lines, *places.say_missing_keys()])


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")


def _conclude(run: _Run, plan: CaptionPlan, start: float) -> None:
    writer = run.writer
    changed = writer.num_changed
    rows: list[Row] = [
        ("captions", f"{writer.num_written} written, {plan.num_kept + plan.num_done_before + changed} kept"),
        ("kept", f"{changed} of them were written by somebody else meanwhile" if changed else None),
        ("time", in_words(time.monotonic() - start)),
    ]
    show_box("Captioning is finished", rows)
    if run.failures:
        shown = [f"\n  {failure}" for failure in itertools.islice(run.failures, LISTED)]
        more = len(run.failures) - len(shown)
        raise DatasetError(
            f"{len(run.failures)} of {len(plan.jobs)} got no caption; all others are done:{''.join(shown)}"
            + (f"\n  ... and {more} more" if more else "")
            + "\n  Repair or remove these files, or try other options, then run the same command again."
        )
