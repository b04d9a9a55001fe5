"""Run tools/caption_dataset.py after its options are read: name missing captions, write or edit them."""

import contextlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.captions.asking import Answerer, Frames, NoCaptionError, read_shown, reword, reword_lines
from data_tools.captions.local_model import load_model
from data_tools.captions.options import CaptioningOptions, WordingOptions
from data_tools.captions.places import (
    FOREIGN,
    OURS,
    CaptionList,
    CaptionPlace,
    Change,
    MadeCaptions,
    find_places,
    keep_backup,
    pass_of,
    plan_captions,
    read_made,
    say_missing_keys,
)
from data_tools.captions.server import ApiServer
from dataset.caching.prefetch import Failure, first_lines
from dataset.config import DatasetConfig
from dataset.sources.fetching import fetch
from modules.atomic_write import write_text
from modules.bars import Bar
from modules.console import Row, count_of, in_words, show_box
from modules.control_codes import escape_control_codes, shorten
from modules.errors import DatasetError, MediaError, OptionError, UserError

logger = logging.getLogger(__name__)

LISTED = 50  # how many missing and failed captions are listed
LISTED_EDITS = 20
SHOWN = 160  # characters of a caption
GIVE_UP = 20  # failures before the first caption, after which the cause is not a single file
SERVER_GONE = 5  # images or clips in a row for which a server failed again and again


def run_captioning(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Write or edit captions. Raises UserError if something is unusable, or captions failed."""
    for table in config.datasets:
        for name in ("caption_prefix", "caption_suffix"):
            text = getattr(options.wording, name).strip()
            if text and getattr(table, name) == text:
                raise OptionError(
                    f"--{name} {text!r}: {table.name} has {name} = {text!r}, which does this without "
                    "touching files; it would be there twice. Leave out one of the two."
                )
    if options.edit_only:
        edit_captions(config, options.wording, options.dry_run)
    else:
        write_captions(config, options)


def write_captions(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Write the missing captions of a dataset, and those that the options ask to replace.

    The model is loaded only if there is something to write. Each caption is written as soon as it is made, so
    the same command continues after a kill. Raises DatasetError if the dataset cannot be used, and at the end
    if there are sources without a caption.
    """
    start = time.monotonic()
    is_again = options.overwrite or options.overwrite_all
    for table in config.datasets if not options.dry_run else ():
        waiting = table.jsonl_file and table.jsonl_file.with_name(f".{table.jsonl_file.name}.captions")
        if waiting and waiting.exists():
            CaptionList(table).take_waiting(waiting)
    places = find_places(config, texts=is_again or options.fill_empty)
    made = read_made(places)
    jobs, num_done = plan_captions(places, made, options)
    num_kept = len(places) - len(jobs) - num_done
    if options.dry_run:
        lines = [f"{place.source.path} ({why}): {place}" for place, why in jobs.items()]
        counts = f"{count_of(len(jobs), 'caption')} would be made, {num_kept} are kept"
        _say([f"{counts}. Nothing is written.", *first_lines(lines, LISTED), *say_missing_keys(config)])
        return
    api = options.api
    engine = str(options.model.model) if api.api_base is None else f"{api.api_model} at {api.api_base}"
    again, foreign = (sum(why == one for why in jobs.values()) for one in (OURS, FOREIGN))
    parts = [f"{len(jobs)} to make", f"{num_kept} kept"]
    parts += [f"{again} of these anew"] if again else []
    parts += [f"{foreign} of these in place of hand-written ones, which become .bak"] if foreign else []
    parts += [f"{num_done} made anew by the run before"] if num_done else []
    show_box("Captioning", [("data", str(config.path)), ("captions", ", ".join(parts)), ("made by", engine)])
    for text in say_missing_keys(config):
        logger.warning("%s", text)
    failures, changed, folders = list[Failure](), 0, made.values() if is_again else ()
    if jobs:
        is_local = api.api_base is None
        engine_of = load_model(options.model, options.ask) if is_local else ApiServer(api, options.ask)
        for folder in folders:
            folder.begin_pass(pass_of(options))
        failures, changed = _make_captions(engine_of.answer, jobs, made, options)
    # with failures the pass goes on: the same command tries these again, not all
    for folder in folders if not failures else ():
        folder.end_pass()
    written = len(jobs) - len(failures) - changed
    rows: list[Row] = [
        ("captions", f"{written} written, {len(places) - len(jobs) + changed} kept"),
        ("kept", f"{changed} of them were written by somebody else meanwhile" if changed else None),
        ("time", in_words(time.monotonic() - start)),
    ]
    show_box("Captioning is finished", rows)
    if failures:
        lines = first_lines(failures, LISTED)
        raise DatasetError(
            f"{len(failures)} of {len(jobs)} got no caption; all others are done:\n"
            + "\n".join(lines)
            + "\n  Repair or remove these files, or try other options, then run the same command again."
        )


def _make_captions(
    answerer: Answerer,
    jobs: Mapping[CaptionPlace, str],
    made: Mapping[Path, MadeCaptions],
    options: CaptioningOptions,
) -> tuple[list[Failure], int]:
    """Make captions, and write each one when it arrives.

    Returns the failures, and how many captions were left alone because they changed meanwhile.
    Raises UserError if the server or the model fails again and again.
    """

    def look(place: CaptionPlace) -> Frames:
        ask, source = options.ask, place.source
        media = replace(source, control=(), mask=None, origins=source.origins[:1])
        with fetch(media) as fetched:
            return read_shown(fetched.path, source.table.kind == "image", ask.num_frames, ask.max_pixels)

    failures: list[Failure] = []
    num_changed = 0
    has_answer = False
    num_failed = 0  # though their files can be read
    server_failed = 0  # in a row
    answers = answerer(list(jobs), look)
    with contextlib.closing(answers), Bar(len(jobs), "captions", unit="caption") as bar:
        for place, answer in answers:
            if isinstance(answer, str):
                has_answer, server_failed = True, 0
                caption = reword(answer, options.wording)
                if not caption:
                    answer = NoCaptionError(f"--replace leaves nothing of the answer {answer!r}")
                elif not place.write(caption, jobs[place] == FOREIGN, made[place.file.parent]):
                    num_changed += 1
            if isinstance(answer, (MediaError, NoCaptionError)):
                failures.append(Failure.of(place.source, answer))
                logger.warning("%s", failures[-1])
            elif not isinstance(answer, str):  # an answerer hands on all that ends it, SystemExit too
                raise answer
            if isinstance(answer, NoCaptionError):
                num_failed += 1
                server_failed = server_failed + 1 if answer.server_failed else 0
                if server_failed == SERVER_GONE:
                    raise UserError(
                        f"The server fails again and again: {answer}. What is written stays: run again later."
                    )
                if not has_answer and num_failed == GIVE_UP:
                    raise UserError(
                        f"None of the first {GIVE_UP} got a caption, the last one because {answer}. Nothing "
                        "more is tried. Try another model, or other options."
                    )
            bar.update()
    return failures, num_changed


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")


def edit_captions(config: DatasetConfig, wording: WordingOptions, dry_run: bool) -> None:
    """Apply `wording` to all captions of a dataset; each file that changes is kept as .bak.

    dry_run: print the changes instead. A caption that would become empty stays as it is. Raises DatasetError
    if the dataset cannot be used, or at the end if captions would become empty.
    """
    places = find_places(config, texts=True)
    made = read_made(places)
    found = list(_edits(places, wording))
    edits, emptied = [edit for edit in found if edit[2]], [edit for edit in found if not edit[2]]
    if dry_run:
        shown = (
            (place.media, *(shorten(" / ".join(text.split("\n")), SHOWN) for text in (old, new)))
            for place, old, new, _ in edits
        )
        lines = [f"{media}: {old!r} -> {new!r}" for media, old, new in shown]
        head = f"{count_of(len(edits), 'caption')} would be changed. Nothing is written."
        _say([head, *first_lines(lines, LISTED_EDITS)])
    else:
        changes: dict[CaptionList, dict[str, Change]] = defaultdict(dict)
        for place, old, new, change in edits:
            record = made[place.file.parent]
            if record.has(place.name, old):  # it stays one of this program
                record.add(place.name, new)
            if place.lines is None:
                keep_backup(place.file)
                write_text(place.file, new)
            else:
                changes[place.lines][place.entry] = change
        for captions, by_entry in changes.items():
            captions.write(by_entry, is_foreign=True)
        rest = f"{len(places) - len(edits)} are as they were"
        show_box("Editing is finished", [("captions", f"{len(edits)} changed, {rest}")])
    if emptied:
        raise DatasetError(
            f"{count_of(len(emptied), 'caption')} would be empty and stay as they are, such as "
            f"{emptied[0][0].media}: {shorten(emptied[0][1], SHOWN)!r}. Write them by hand, or remove them "
            "and have new ones made."
        )


def _edits(
    places: Sequence[CaptionPlace], wording: WordingOptions
) -> Iterator[tuple[CaptionPlace, str, str, Change]]:
    """Yield the captions that change: place, old text, new text, and (old, new) values of a line in a list.

    The new text is empty if it, or one of several captions, would become empty.
    """
    for place in places:
        several = place.source.table.multi_caption
        if place.lines is not None:
            record = place.lines.record(place.entry)
            keys = ("caption", "captions") if several else ("caption",)
            old: dict[str, Any] = {key: record[key] for key in keys if record.get(key) is not None}
            new = {
                key: reword(value, wording)
                if isinstance(value, str)
                else [reword(text, wording) for text in value]
                for key, value in old.items()
            }
            changed = [key for key in new if new[key] != old[key]]
            old, new = ({key: one[key] for key in changed} for one in (old, new))
            before, after = (
                [text for value in one.values() for text in ([value] if isinstance(value, str) else value)]
                for one in (old, new)
            )
            if changed:
                yield place, "\n".join(before), "\n".join(after) if all(after) else "", (old, new)
        elif place.caption is not None:
            text = reword_lines(place.caption, wording, several)
            if text != place.caption:
                yield place, place.caption, text, ({}, {})
