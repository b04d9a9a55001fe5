"""Run tools/caption_dataset.py once its options are parsed: list, write or edit captions."""

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.captions.asking import (
    Answerer,
    Frames,
    Look,
    NoCaptionError,
    read_shown,
    reword,
)
from data_tools.captions.formats import ObjectAsker, reword_object, write_object
from data_tools.captions.local_model import load_model
from data_tools.captions.options import (
    TOKENS,
    TOKENS_OF_OBJECTS,
    AskOptions,
    CaptioningOptions,
    WordingOptions,
)
from data_tools.captions.places import (
    FOREIGN,
    OURS,
    CaptionList,
    CaptionLocation,
    Change,
    MadeCaptions,
    WhichCaptions,
    find_places,
    plan_captions,
    read_made,
    say_missing_keys,
)
from data_tools.captions.server import ApiServer
from dataset.caching.prefetch import Failure, first_lines
from dataset.config import DatasetConfig
from dataset.listing import find_all_sources
from dataset.sources.captions import lines_of
from dataset.sources.fetching import fetch
from modules.atomic_write import write_text
from modules.backups import keep_backup
from modules.bars import Bar
from modules.console import Row, format_count, format_duration, show_box
from modules.control_codes import escape_control_codes, shorten
from modules.errors import DatasetError, MediaError, OptionError, UserError
from modules.text_files import read_if_object
from protocols.caption_formats import CaptionFormat
from protocols.families import caption_formats

logger = logging.getLogger(__name__)

LISTED = 50  # maximum number of missing or failed captions that are listed
LISTED_EDITS = 20  # maximum number of edits that are listed
SHOWN = 160  # characters of a caption in messages
GIVE_UP = 20  # the run stops after this number of failures if no file got a caption
SERVER_GONE = 5  # the run stops after the server failed for this number of files in a row


@dataclass(frozen=True)
class CaptionMaker:
    """What makes captions (a model or server), and which captions it makes."""

    name: str  # name of the model, for messages
    pass_id: str  # hash of the options, see `plan_captions`
    rewritten: WhichCaptions
    load: Callable[[], Answerer]  # loads the model
    look: Look  # reads the frames of a source; raises MediaError if that fails
    finish: Callable[[CaptionLocation, str], str]  # turns an answer into a caption; "" if nothing remains
    # called at the end: describes which keys answers lacked; None: no key was missing
    describe_unsaid: Callable[[], str | None] = lambda: None


def run_captioning(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Caption the files of a dataset, or edit their existing captions.

    Raises:
        UserError: If an option or the dataset is invalid, or if captions failed.
    """
    for table in config.datasets:
        for name in ("caption_prefix", "caption_suffix"):
            text = getattr(options.wording, name).strip()
            # training would add the text a second time
            if text and getattr(table, name) == text:
                raise OptionError(
                    f"--{name} {text!r}: {table.name} has {name} = {text!r}, which does this without "
                    "touching files; it would be there twice. Leave out one of the two."
                )
    format = None if options.caption_format is None else caption_formats()[options.caption_format]
    if options.edit_only:
        edit_captions(config, options.wording, options.dry_run, format)
        return
    default_tokens = TOKENS if format is None else TOKENS_OF_OBJECTS
    ask = replace(options.ask, max_new_tokens=options.ask.max_new_tokens or default_tokens)
    maker = CaptionMaker(
        name=str(options.model.model),
        pass_id=_pass_of(options),  # equal for the same options, so that an interrupted run is continued
        rewritten=WhichCaptions(
            options.overwrite, options.overwrite_all, options.fill_empty, options.convert_plain
        ),
        load=lambda: _load_answerer(options, ask),
        look=lambda location: look_at(location, ask.num_frames, ask.max_pixels),
        finish=lambda location, answer: reword(answer, options.wording),
    )
    if format is not None:  # the asker checks and rewords captions that are JSON objects
        _reject_edits(config, options)
        asker = ObjectAsker(format, options.wording, ask.prompt, tells_plain=options.convert_plain)
        maker = replace(
            maker,
            load=lambda: asker.around(_load_answerer(options, ask)),
            finish=lambda location, answer: answer,
            describe_unsaid=asker.describe_unsaid,
        )
    if options.api.api_base is not None:
        maker = replace(maker, name=f"{options.api.api_model} at {options.api.api_base}")
    if options.try_on is not None:
        try_captions(config, maker, options.try_on)
    else:
        write_captions(config, maker, options.dry_run)


def _reject_edits(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Raise OptionError if a table is for image editing, where captions are instructions."""
    lists = tuple(table for table in config.datasets if table.jsonl_file is not None)
    listed = find_all_sources(replace(config, datasets=lists), captions=False)
    for table in config.datasets:
        if table.control_directory or any(one.control and one.table is table for one in listed):
            raise OptionError(
                f"--caption_format {options.caption_format}: {table.name} has pictures before an edit, and "
                "its captions say what is changed. A model that sees the results alone cannot write them"
            )


def _pass_of(options: CaptioningOptions) -> str:
    """Return a hash of the options that influence captions."""
    info = [options.caption_format, options.overwrite_all]
    made_by = [options.model.model, options.api.api_base, options.api.api_model]
    values = json.dumps([*info, *made_by, asdict(options.ask), asdict(options.wording)])
    return hashlib.sha256(values.encode("utf-8")).hexdigest()


def write_captions(config: DatasetConfig, maker: CaptionMaker, dry_run: bool) -> None:
    """Write the missing captions of a dataset, and replace the existing captions that the options select.

    With `dry_run`, print what would be written instead. The model is loaded only if there is something to
    write. Each caption is written at once, so that the same command continues an interrupted run.

    Raises:
        DatasetError: If the dataset cannot be used, or at the end if sources got no caption.
    """
    start = time.monotonic()
    replaces = maker.rewritten.ours or maker.rewritten.all
    if not dry_run:
        _add_pending(config)  # captions that a killed run has not put into its list yet
    locations = find_places(config, texts=replaces or maker.rewritten.empty or maker.rewritten.plain)
    records = read_made(locations)
    jobs, num_done = plan_captions(locations, records, maker.rewritten, maker.pass_id)
    num_kept = len(locations) - len(jobs) - num_done
    if dry_run:
        _print_jobs(config, jobs, num_kept)
        return
    _show_start(config, maker.name, jobs, num_kept=num_kept, num_done=num_done)
    for text in say_missing_keys(config):
        logger.warning("%s", text)
    failures: list[Failure] = []
    num_changed = 0  # captions that somebody else has written while the model answered
    replaced_records = list(records.values()) if replaces else []
    if jobs:
        answerer = maker.load()
        for record in replaced_records:
            record.begin_pass(maker.pass_id)
        failures, num_changed = _make_captions(answerer, jobs, records, maker)
    if not failures:  # with failures the pass stays open: the same command then retries only these
        for record in replaced_records:
            record.end_pass()
    num_written = len(jobs) - len(failures) - num_changed
    num_not_written = len(locations) - len(jobs) + num_changed
    foreign = f"{num_changed} of them were written by somebody else meanwhile" if num_changed else None
    rows: list[Row] = [
        ("captions", f"{num_written} written, {num_not_written} kept"),
        ("kept", foreign),
        ("not said", maker.describe_unsaid()),
        ("time", format_duration(time.monotonic() - start)),
    ]
    show_box("Captioning is finished", rows)
    if failures:
        lines = [
            f"{len(failures)} of {len(jobs)} got no caption; all others are done:",
            *first_lines(failures, LISTED),
            "  Repair or remove these files, or try other options, then run the same command again.",
        ]
        raise DatasetError("\n".join(lines))


def _print_jobs(config: DatasetConfig, jobs: Mapping[CaptionLocation, str], num_kept: int) -> None:
    """Print the captions that would be written, for --dry_run."""
    counts = f"{format_count(len(jobs), 'caption')} would be made, {num_kept} are kept"
    lines = [f"{location.source.path} ({why}): {location}" for location, why in jobs.items()]
    _print([f"{counts}. Nothing is written.", *first_lines(lines, LISTED), *say_missing_keys(config)])


def try_captions(config: DatasetConfig, maker: CaptionMaker, count: int) -> None:
    """Caption `count` files as a trial: print the captions and write nothing.

    Files without a caption come first.

    Raises:
        DatasetError: If the dataset cannot be used, or if files got no caption.
    """
    locations = sorted(find_places(config, texts=False), key=lambda location: location.has_caption)[:count]
    answerer = maker.load()
    failures: list[Failure] = []
    answers = answerer(locations, maker.look)
    with contextlib.closing(answers):
        for location, answer in answers:
            if isinstance(answer, str):
                _print([str(location.source.path), f"  {maker.finish(location, answer)}"])
                sys.stdout.flush()
            elif isinstance(answer, (MediaError, NoCaptionError)):
                failures.append(Failure.of(location.source, answer))
            else:  # not an error of this file alone
                raise answer
    if failures:
        raise DatasetError("\n".join(first_lines(failures, LISTED)))


def look_at(location: CaptionLocation, num_frames: int, max_pixels: int) -> Frames:
    """Return the frames of a media file that the captioning model sees.

    Raises:
        MediaError: If the file cannot be read.
    """
    source = location.source
    media = replace(source, control=(), mask=None, remote_or_packed=source.remote_or_packed[:1])
    is_image = source.table.kind == "image"
    with fetch(media) as fetched:
        return read_shown(fetched.path, is_image, num_frames, max_pixels)


def _add_pending(config: DatasetConfig) -> None:
    """Move captions left by a killed run of an earlier version into their lists."""
    for table in config.datasets:
        if table.jsonl_file:
            pending = table.jsonl_file.with_name(f".{table.jsonl_file.name}.captions")
            if pending.exists():
                CaptionList(table).add_pending(pending)


def _show_start(
    config: DatasetConfig,
    maker: str,
    jobs: Mapping[CaptionLocation, str],
    num_kept: int,
    num_done: int,
) -> None:
    """Show what a captioning run will do: dataset, numbers of captions, and model.

    `num_done` is the number of captions that an interrupted run has already replaced.
    """
    reasons = Counter(jobs.values())
    counts = [f"{len(jobs)} to make", f"{num_kept} kept"]
    if reasons[OURS]:
        counts.append(f"{reasons[OURS]} of these again")
    if reasons[FOREIGN]:
        counts.append(f"{reasons[FOREIGN]} of these in place of hand-written ones, which become .bak")
    if num_done:
        counts.append(f"{num_done} made again by the previous run")
    rows: list[Row] = [
        ("data", str(config.path)),
        ("captions", ", ".join(counts)),
        ("made by", maker),
    ]
    show_box("Captioning", rows)


def _load_answerer(options: CaptioningOptions, ask: AskOptions) -> Answerer:
    """Return the function that makes captions, with a server or with a local model that is loaded first."""
    if options.api.api_base is None:
        return load_model(options.model, ask).answer
    return ApiServer(options.api, ask).answer


def _make_captions(
    answerer: Answerer,
    jobs: Mapping[CaptionLocation, str],
    records: Mapping[Path, MadeCaptions],
    maker: CaptionMaker,
) -> tuple[list[Failure], int]:
    """Ask for the captions one after another, and write each caption as soon as it arrives.

    Returns:
        The failures, and the number of captions that were not replaced because somebody changed them
        meanwhile.

    Raises:
        UserError: If the server or the model fails repeatedly.
    """
    failures: list[Failure] = []
    num_changed = 0
    rejections = _Rejections()
    answers = answerer(list(jobs), maker.look)
    with contextlib.closing(answers), Bar(len(jobs), "captions", unit="caption") as bar:
        for location, answer in answers:
            error = None if isinstance(answer, str) else answer
            if isinstance(answer, str):
                rejections.clear()  # the server or model works
                caption = maker.finish(location, answer)
                if not caption:
                    error = NoCaptionError(f"--replace leaves nothing of the answer {answer!r}")
                else:
                    replaces_foreign = jobs[location] == FOREIGN  # a caption that somebody else wrote
                    record = records[location.file.parent]
                    if not location.write(caption, replaces_foreign, record):
                        num_changed += 1
            if isinstance(error, (MediaError, NoCaptionError)):
                failures.append(Failure.of(location.source, error))
                logger.warning("%s", failures[-1])
            elif error is not None:  # ends the run; may be SystemExit
                raise error
            # raises if nearly all sources fail for lack of a caption
            if isinstance(error, NoCaptionError):
                rejections.add(error)
            bar.update()
    return failures, num_changed


class _Rejections:
    """Count sources without a caption in order to end a run in which nearly all fail."""

    def __init__(self) -> None:
        self._has_answer = False
        self._total = 0
        self._of_server = 0  # server failures in a row

    def clear(self) -> None:
        """Forget earlier failures, since an answer has arrived."""
        self._has_answer = True
        self._of_server = 0

    def add(self, error: NoCaptionError) -> None:
        """Count a source that got no caption, and end the run if nearly all fail.

        Raises:
            UserError: If the server fails many times in a row, or if the first sources all get no caption.
        """
        self._total += 1
        self._of_server = self._of_server + 1 if error.server_failed else 0  # failures in a row
        if self._of_server == SERVER_GONE:
            raise UserError(
                f"The server fails again and again: {error}. What is written stays: run again later."
            )
        if not self._has_answer and self._total == GIVE_UP:
            raise UserError(
                f"None of the first {GIVE_UP} got a caption, the last one because {error}. Nothing "
                "more is tried. Try another model, or other options."
            )


def _print(lines: Sequence[str]) -> None:
    """Print lines with control codes made visible, since captions may contain some."""
    sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")


@dataclass(frozen=True)
class _Edit:
    """One caption before and after editing."""

    location: CaptionLocation
    old: str
    new: str  # "" if a caption would become empty
    change: Change = ({}, {})  # old and new values, for a line in a list


def edit_captions(
    config: DatasetConfig, wording: WordingOptions, dry_run: bool, format: CaptionFormat | None = None
) -> None:
    """Apply wording options to all captions of a dataset; changed files are backed up as .bak.

    A caption that would become empty is not changed.

    Args:
        config: The dataset.
        wording: Changes of captions.
        dry_run: Whether to print the changes instead of writing them.
        format: Format of captions that are JSON objects; None if it is unknown.

    Raises:
        DatasetError: If the dataset cannot be used, or at the end if captions would have become empty.
        OptionError: If words should be added to a JSON object of unknown format.
    """
    locations = find_places(config, texts=True)
    records = read_made(locations)
    all_edits = list(_list_edits(locations, wording, format))
    edits = [edit for edit in all_edits if edit.new]
    emptied = [edit for edit in all_edits if not edit.new]
    if dry_run:
        _print_edits(edits)
    else:
        _write_edits(edits, records)
        unchanged = f"{len(locations) - len(edits)} are unchanged"
        show_box("Editing is finished", [("captions", f"{len(edits)} changed, {unchanged}")])
    if emptied:
        raise DatasetError(
            f"{format_count(len(emptied), 'caption')} would be empty and stay as they are, such as "
            f"{emptied[0].location.media}: {shorten(emptied[0].old, SHOWN)!r}. Write them by hand, or remove "
            "them and have new ones made."
        )


def _print_edits(edits: Sequence[_Edit]) -> None:
    """Print the captions before and after editing, for --dry_run."""
    lines = [f"{edit.location.media}: {_shorten(edit.old)!r} -> {_shorten(edit.new)!r}" for edit in edits]
    head = f"{format_count(len(edits), 'caption')} would be changed. Nothing is written."
    _print([head, *first_lines(lines, LISTED_EDITS)])


def _shorten(caption: str) -> str:
    """Shorten a caption to one line of at most SHOWN characters."""
    return shorten(" / ".join(caption.split("\n")), SHOWN)


def _write_edits(edits: Sequence[_Edit], records: Mapping[Path, MadeCaptions]) -> None:
    """Write edited captions: files one by one, then each list once."""
    changes: dict[CaptionList, dict[str, Change]] = defaultdict(dict)
    for edit in edits:
        location = edit.location
        record = records[location.file.parent]
        # a record lists the captions that this program wrote, with hashes: an edited one still counts
        if record.has(location.name, edit.old):
            record.add(location.name, edit.new)
        if location.lines is None:
            keep_backup(location.file)
            write_text(location.file, edit.new)
        else:
            changes[location.lines][location.entry] = edit.change
    for captions, by_entry in changes.items():
        # the old list is always backed up, as its captions may be a person's
        captions.write(by_entry, is_foreign=True)


def _list_edits(
    locations: Sequence[CaptionLocation], wording: WordingOptions, format: CaptionFormat | None
) -> Iterator[_Edit]:
    """Yield the old and the new text of each caption that the wording options change.

    `format` is the format of captions that are JSON objects; None if none is chosen.
    """

    def reword_text(location: CaptionLocation, caption: str) -> str:
        """Apply the wording options to a plain caption, or to each text in a JSON caption."""
        content = read_if_object(caption)
        if content is None:
            return reword(caption, wording)
        _check_words_around(location, content, wording, format)
        return write_object(reword_object(content, wording, "" if format is None else format.main))

    for location in locations:
        is_several = location.source.table.multi_caption
        if location.lines is not None:
            edit = _edit_line(location, location.lines.record(location.entry), is_several, reword_text)
            if edit is not None:
                yield edit
        elif location.caption is not None:
            lines = lines_of(location.caption) if is_several else [location.caption]
            # a caption that becomes empty loses its line
            text = "\n".join(filter(None, (reword_text(location, line) for line in lines)))
            if text != location.caption:
                yield _Edit(location, location.caption, text)


def _check_words_around(
    location: CaptionLocation,
    content: Mapping[str, Any],
    wording: WordingOptions,
    format: CaptionFormat | None,
) -> None:
    """Raise OptionError if words cannot be added to a JSON caption, for lack of a known main text."""
    if not (wording.trigger_word or wording.caption_prefix or wording.caption_suffix):
        return
    start = f"{location.media}: its caption is a JSON object, which --trigger_word, --caption_prefix and "
    if format is None:
        formats = ", ".join(caption_formats())
        raise OptionError(
            f"{start}--caption_suffix would break. Say whose it is by --caption_format ({formats}): then "
            "they go into its texts"
        )
    if format.main not in content:
        raise OptionError(
            f"{start}--caption_suffix put into {format.main}, and it has none. Write it there by hand"
        )


def _edit_line(
    location: CaptionLocation,
    line: Mapping[str, Any],
    is_several: bool,
    reword_text: Callable[[CaptionLocation, str], str],
) -> _Edit | None:
    """Return the edit of a line in a list of captions; None if the wording options change nothing.

    `is_several` says that the line may have several captions under the key "captions". An edit with an empty
    new text is reported and not written.
    """
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    keys = ("caption", "captions") if is_several else ("caption",)
    for key in keys:
        value = line.get(key)  # a text or a list of texts
        if value is None:
            continue
        if isinstance(value, str):
            reworded: str | list[str] = reword_text(location, value)
        else:
            reworded = [reword_text(location, text) for text in value]
        if reworded != value:
            old[key] = value
            new[key] = reworded
    if not new:
        return None
    new_texts = _list_texts(new)
    return _Edit(
        location,
        old="\n".join(_list_texts(old)),
        # one empty caption makes the whole line an edit that is not written
        new="\n".join(new_texts) if all(new_texts) else "",
        change=(old, new),
    )


def _list_texts(values: Mapping[str, Any]) -> list[str]:
    """Return all texts in a mapping, whose values are texts or lists of texts."""
    texts: list[str] = []
    for value in values.values():
        texts += [value] if isinstance(value, str) else value
    return texts
