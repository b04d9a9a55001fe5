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
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.captions.asking import (
    DEFAULT_MAX_JSON_TOKENS,
    DEFAULT_MAX_TOKENS,
    AskOptions,
    Captioner,
    Frames,
    NoCaptionError,
    ReadFrames,
    WordingOptions,
    read_sampled_frames,
    reword,
)
from data_tools.captions.formats import JsonCaptioner, reword_object, write_object
from data_tools.captions.local_model import CaptionModelOptions, load_model
from data_tools.captions.places import (
    GENERATED,
    HAND_WRITTEN,
    CaptionList,
    CaptionLocation,
    GeneratedCaptions,
    LineChange,
    OverwriteRules,
    WritingOptions,
    describe_missing_extensions,
    find_caption_locations,
    plan_captions,
    read_generated_captions,
)
from data_tools.captions.server import ApiOptions, ApiServer
from dataset.caching.prefetch import Failure, first_lines
from dataset.config import DatasetConfig
from dataset.listing import find_all_sources
from dataset.options import DATASET_FILE
from dataset.sources.captions import split_lines
from dataset.sources.fetching import fetch
from modules.atomic_write import write_text
from modules.backups import keep_backup
from modules.bars import Bar
from modules.console import Row, format_count, format_duration, show_box
from modules.control_codes import escape_control_codes, shorten
from modules.errors import DatasetError, MediaError, OptionError, UserError
from modules.options import option
from modules.text_files import read_if_object
from protocols.caption_formats import CaptionFormat
from protocols.families import caption_formats

logger = logging.getLogger(__name__)

LISTED = 50  # maximum number of missing or failed captions that are listed
LISTED_EDITS = 20  # maximum number of edits that are listed
SHOWN = 160  # characters of a caption in messages
MAX_INITIAL_FAILURES = 20  # the run stops after this number of failures if no file got a caption
MAX_SERVER_FAILURES = 5  # the run stops after the server failed for this number of files in a row


class CaptioningOptions(WritingOptions, title="what to do"):
    """Which captions are written, by which model, and how they are reworded."""

    key_files = (DATASET_FILE,)

    dataset_config: Path = option("dataset configuration, .toml or .json", required=True, by_place=True)
    caption_format: str | None = option(
        "write JSON objects with the keys that the model of this family was trained with, such as fibo_2. "
        "Each answer is checked, and requested again if it is invalid; --trigger_word and the like change "
        "the texts in the objects"
    )
    convert_plain: bool = option(
        "also turn captions that are sentences into such objects, from the image and the sentences; "
        "these are kept next to the new ones as .bak",
        needs="caption_format",
    )
    edit_only: bool = option(
        "make no captions: apply --replace, --replace_regex, --trigger_word, --caption_prefix and "
        "--caption_suffix to existing captions; the old ones are kept as .bak",
        excludes=("overwrite", "overwrite_all", "fill_empty", "try_on", "convert_plain"),
        hint="it makes no captions",
    )
    model: CaptionModelOptions
    api: ApiOptions
    ask: AskOptions
    wording: WordingOptions

    def __post_init__(self) -> None:
        if self.caption_format is not None and self.caption_format not in caption_formats():
            raise OptionError(
                f"--caption_format {self.caption_format} is not a format of JSON captions. Choose from "
                f"{', '.join(caption_formats())}, or omit it for sentences"
            )
        self._check_model_or_server()
        if self.edit_only:
            for name, value in (
                ("model", self.model.model),
                ("api_base", self.api.api_base),
                ("prompt", self.ask.prompt),
            ):
                if value is not None:
                    raise OptionError(f"--edit_only makes no captions: omit --{name}")
            if not self.wording.changes_something:
                raise OptionError(
                    "--edit_only changes nothing by itself: add --replace, --replace_regex, --trigger_word, "
                    "--caption_prefix or --caption_suffix"
                )

    def _check_model_or_server(self) -> None:
        """Raise OptionError if --model and --api_base are both given, or neither although one is needed."""
        has_model = self.model.model is not None
        has_server = self.api.api_base is not None
        if has_model and has_server:
            raise OptionError("--model and --api_base exclude each other: pass one of the two")
        if has_server:
            for name in ("batch_size", "dtype", "device"):
                if getattr(self.model, name) is not None:
                    raise OptionError(f"--{name} is for --model: omit it with --api_base")
        makes_captions = not (self.edit_only or self.dry_run)
        if makes_captions and not has_model and not has_server:
            raise OptionError(
                "--model or --api_base is missing: pass the folder of a model, or a server and --api_model. "
                "--dry_run and --edit_only need neither"
            )


@dataclass(frozen=True)
class CaptionBackend:
    """What makes captions (a model or server), and which captions it makes."""

    model_name: str  # for messages
    options_hash: str  # a run with the same hash continues an interrupted one
    overwrite_rules: OverwriteRules
    load_captioner: Callable[[], Captioner]  # loads the model
    read_frames: ReadFrames  # reads the frames of a source; raises MediaError if that fails
    postprocess: Callable[[CaptionLocation, str], str]  # answer -> caption; "" if nothing remains
    # called at the end: describes which keys answers lacked; None: no key was missing
    describe_missing_keys: Callable[[], str | None] = lambda: None


def run_captioning(config: DatasetConfig, options: CaptioningOptions) -> None:
    """Caption the files of a dataset, or edit their existing captions.

    Raises:
        UserError: If an option or the dataset is invalid, or if captions failed.
    """
    for table in config.datasets:
        for name in ("caption_prefix", "caption_suffix"):
            text = getattr(options.wording, name).strip()
            if text and table.value_of(name) == text:
                raise OptionError(
                    f"--{name} {text!r}: {table.name} has {name} = {text!r}, which does this without "
                    "touching files; it would be there twice. Omit one of the two."
                )
    format = None if options.caption_format is None else caption_formats()[options.caption_format]
    if options.edit_only:
        edit_captions(config, options.wording, options.dry_run, format)
        return
    if format is None:
        backend = _make_text_backend(options, DEFAULT_MAX_TOKENS)
    else:
        # in tables for image editing, captions are instructions
        list_tables = tuple(table for table in config.datasets if table.source.jsonl_file is not None)
        listed = find_all_sources(replace(config, datasets=list_tables), captions=False)
        for table in config.datasets:
            if table.references.control_directory or any(
                source.control and source.table is table for source in listed
            ):
                raise OptionError(
                    f"--caption_format {options.caption_format}: {table.name} has images before an edit, and "
                    "its captions say what is changed. A model that sees only the results cannot write them"
                )
        backend = _make_json_backend(options, format)
    if options.try_on is not None:
        try_captions(config, backend, options.try_on)
    else:
        write_captions(config, backend, options.dry_run)


def _make_text_backend(options: CaptioningOptions, default_max_tokens: int) -> CaptionBackend:
    """Return the model or server that the options select, for captions in plain text."""
    max_tokens = options.ask.max_new_tokens or default_max_tokens
    ask_options = replace(options.ask, max_new_tokens=max_tokens)
    model_name = str(options.model.model)
    if options.api.api_base is not None:
        model_name = f"{options.api.api_model} at {options.api.api_base}"
    return CaptionBackend(
        model_name=model_name,
        options_hash=_hash_options(options),
        overwrite_rules=OverwriteRules(
            options.overwrite, options.overwrite_all, options.fill_empty, options.convert_plain
        ),
        load_captioner=lambda: _load_captioner(options, ask_options),
        read_frames=lambda location: fetch_frames(location, ask_options.num_frames, ask_options.max_pixels),
        postprocess=lambda location, answer: reword(answer, options.wording),
    )


def _make_json_backend(options: CaptioningOptions, format: CaptionFormat) -> CaptionBackend:
    """Return the model or server that the options select, for captions that are JSON objects."""
    backend = _make_text_backend(options, DEFAULT_MAX_JSON_TOKENS)
    # it checks the objects, and applies the wording options to them
    json_captioner = JsonCaptioner(
        format, options.wording, options.ask.prompt, includes_plain_caption=options.convert_plain
    )
    return replace(
        backend,
        load_captioner=lambda: json_captioner.wrap_captioner(backend.load_captioner()),
        postprocess=lambda location, answer: answer,
        describe_missing_keys=json_captioner.describe_missing_keys,
    )


def _hash_options(options: CaptioningOptions) -> str:
    """Return a hash of the options that influence captions."""
    info = [options.caption_format, options.overwrite_all]
    made_by = [options.model.model, options.api.api_base, options.api.api_model]
    values = json.dumps([*info, *made_by, asdict(options.ask), asdict(options.wording)])
    return hashlib.sha256(values.encode("utf-8")).hexdigest()


def write_captions(config: DatasetConfig, backend: CaptionBackend, dry_run: bool) -> None:
    """Write the missing captions of a dataset, and replace the existing captions that the options select.

    With `dry_run`, print what would be written instead. The model is loaded only if there is something to
    write. Each caption is written at once, so that the same command continues an interrupted run.

    Raises:
        DatasetError: If the dataset cannot be used, or at the end if sources got no caption.
    """
    start_seconds = time.monotonic()
    rules = backend.overwrite_rules
    if not dry_run:
        _recover_pending(config)  # captions that a killed run has not put into its list yet
    reads_captions = rules.generated or rules.all or rules.empty or rules.plain_text
    locations = find_caption_locations(config, reads_captions)
    records = read_generated_captions(locations)
    reasons, num_done_before = plan_captions(locations, records, rules, backend.options_hash)
    num_kept = len(locations) - len(reasons) - num_done_before
    if dry_run:
        _print_plan(config, reasons, num_kept)
        return
    _show_start(config, backend.model_name, reasons, num_kept=num_kept, num_done_before=num_done_before)
    for warning in describe_missing_extensions(config):
        logger.warning("%s", warning)
    failures, num_changed = _make_recorded_captions(backend, reasons, records)
    num_written = len(reasons) - len(failures) - num_changed
    num_not_written = len(locations) - len(reasons) + num_changed
    seconds = time.monotonic() - start_seconds
    _show_results(backend, seconds, num_written, num_not_written=num_not_written, num_changed=num_changed)
    if failures:
        raise _explain_failures(failures, num_to_caption=len(reasons))


def _show_results(
    backend: CaptionBackend, seconds: float, num_written: int, num_not_written: int, num_changed: int
) -> None:
    """Show how many captions were written and kept; somebody else changed `num_changed` meanwhile."""
    changed_text = f"{num_changed} of them were written by somebody else meanwhile" if num_changed else None
    rows: list[Row] = [
        ("captions", f"{num_written} written, {num_not_written} kept"),
        ("kept", changed_text),
        ("missing keys", backend.describe_missing_keys()),
        ("time", format_duration(seconds)),
    ]
    show_box("Captioning is finished", rows)


def _explain_failures(failures: Sequence[Failure], num_to_caption: int) -> DatasetError:
    """Return the error at the end of a run in which some media files got no caption."""
    lines = [
        f"{len(failures)} of {num_to_caption} got no caption; all others are done:",
        *first_lines(failures, LISTED),
        "  Repair or remove these files, or try other options, then run the same command again.",
    ]
    return DatasetError("\n".join(lines))


def _make_recorded_captions(
    backend: CaptionBackend,
    reasons: Mapping[CaptionLocation, str],
    records: Mapping[Path, GeneratedCaptions],
) -> tuple[list[Failure], int]:
    """Load the model and make all captions in `reasons`."""
    # Return the failures, and how many changed meanwhile.
    # If existing captions are replaced, each folder's record notes when this pass begins and ends. After
    # failures no end is noted, so that the same command continues with the failed files.
    rules = backend.overwrite_rules
    pass_records = list(records.values()) if rules.generated or rules.all else []
    failures: list[Failure] = []
    num_changed = 0
    if reasons:
        captioner = backend.load_captioner()
        for record in pass_records:
            record.begin_pass(backend.options_hash)
        failures, num_changed = _make_captions(captioner, reasons, records, backend)
    if not failures:  # else the same command makes only the failed captions again
        for record in pass_records:
            record.end_pass()
    return failures, num_changed


def _print_plan(config: DatasetConfig, reasons: Mapping[CaptionLocation, str], num_kept: int) -> None:
    """Print the captions that would be written and the reason for each, for --dry_run."""
    counts = f"{format_count(len(reasons), 'caption')} would be made, {num_kept} are kept"
    lines = [f"{location.source.path} ({reason}): {location}" for location, reason in reasons.items()]
    warnings = describe_missing_extensions(config)
    _print([f"{counts}. Nothing is written.", *first_lines(lines, LISTED), *warnings])


def try_captions(config: DatasetConfig, backend: CaptionBackend, count: int) -> None:
    """Caption `count` files as a trial: print the captions and write nothing.

    Files without a caption come first.

    Raises:
        DatasetError: If the dataset cannot be used, or if files got no caption.
    """
    locations = find_caption_locations(config, reads_captions=False)
    locations.sort(key=lambda location: location.has_caption)
    captioner = backend.load_captioner()
    failures: list[Failure] = []
    captions = captioner(locations[:count], backend.read_frames)
    with contextlib.closing(captions):
        for location, caption in captions:
            if isinstance(caption, str):
                _print([str(location.source.path), f"  {backend.postprocess(location, caption)}"])
                sys.stdout.flush()
            elif isinstance(caption, (MediaError, NoCaptionError)):
                failures.append(Failure.of(location.source, caption))
            else:  # an error that is not specific to this file
                raise caption
    if failures:
        raise DatasetError("\n".join(first_lines(failures, LISTED)))


def fetch_frames(location: CaptionLocation, num_frames: int, max_pixels: int) -> Frames:
    """Return the frames of an image or clip that the captioning model sees; a remote file is downloaded.

    Raises:
        MediaError: If the file cannot be read.
    """
    source = location.source
    is_image = source.table.kind == "image"
    without_companions = replace(source, control=(), mask=None, remote_or_packed=source.remote_or_packed[:1])
    with fetch(without_companions) as local_source:
        return read_sampled_frames(local_source.path, is_image, num_frames, max_pixels)


def _recover_pending(config: DatasetConfig) -> None:
    """Move captions left by a killed run of an earlier version into their lists."""
    for table in config.datasets:
        if table.source.jsonl_file:
            pending = table.source.jsonl_file.with_name(f".{table.source.jsonl_file.name}.captions")
            if pending.exists():
                CaptionList(table).recover_pending(pending)


def _show_start(
    config: DatasetConfig,
    model_name: str,
    reasons: Mapping[CaptionLocation, str],
    num_kept: int,
    num_done_before: int,
) -> None:
    """Show what a captioning run will do: dataset, numbers of captions, and model."""
    # `num_done_before` is the number of captions that an interrupted run has already replaced.
    num_by_reason = Counter(reasons.values())
    num_hand_written = num_by_reason[HAND_WRITTEN]
    counts = [f"{len(reasons)} to make", f"{num_kept} kept"]
    if num_by_reason[GENERATED]:
        counts.append(f"{num_by_reason[GENERATED]} of these replace generated ones")
    if num_hand_written:
        counts.append(f"{num_hand_written} of these replace hand-written ones, which are kept as .bak")
    if num_done_before:
        counts.append(f"{num_done_before} made again by the previous run")
    rows: list[Row] = [
        ("data", str(config.path)),
        ("captions", ", ".join(counts)),
        ("made by", model_name),
    ]
    show_box("Captioning", rows)


def _load_captioner(options: CaptioningOptions, ask_options: AskOptions) -> Captioner:
    """Return the function that makes captions, with a server or with a local model that is loaded first."""
    if options.api.api_base is None:
        return load_model(options.model, ask_options).caption
    return ApiServer(options.api, ask_options).caption


def _make_captions(
    captioner: Captioner,
    reasons: Mapping[CaptionLocation, str],
    records: Mapping[Path, GeneratedCaptions],
    backend: CaptionBackend,
) -> tuple[list[Failure], int]:
    """Caption each location in `reasons`, and write each caption as soon as it arrives."""
    failures: list[Failure] = []
    num_changed = 0
    failure_limit = _FailureLimit()
    answers = captioner(list(reasons), backend.read_frames)
    with contextlib.closing(answers), Bar(len(reasons), "captions", unit="caption") as bar:
        for location, answer in answers:
            caption: str | BaseException = answer
            if isinstance(answer, str):
                failure_limit.note_answer()
                empty_error = NoCaptionError(f"--replace leaves nothing of the answer {answer!r}")
                caption = backend.postprocess(location, answer) or empty_error
            if isinstance(caption, str):
                is_hand_written = reasons[location] == HAND_WRITTEN  # the caption that is replaced
                if not location.write(caption, is_hand_written, records[location.file.parent]):
                    num_changed += 1
            elif isinstance(caption, (MediaError, NoCaptionError)):
                failures.append(Failure.of(location.source, caption))
                logger.warning("%s", failures[-1])
                if isinstance(caption, NoCaptionError):
                    failure_limit.note_failure(caption)
            else:  # it ends the run, and may be SystemExit
                raise caption
            bar.update()
    return failures, num_changed


class _FailureLimit:
    """Ends a captioning run in which nearly all media files get no caption."""

    def __init__(self) -> None:
        self._has_answer = False
        self._num_failures = 0
        self._num_server_failures = 0  # in a row

    def note_answer(self) -> None:
        """Record that the server or model works."""
        self._has_answer = True
        self._num_server_failures = 0

    def note_failure(self, error: NoCaptionError) -> None:
        """Count a source that got no caption, and end the run if nearly all fail.

        Raises:
            UserError: If the server fails many times in a row, or if the first sources all get no caption.
        """
        self._num_failures += 1
        self._num_server_failures = self._num_server_failures + 1 if error.server_failed else 0
        if self._num_server_failures == MAX_SERVER_FAILURES:
            raise UserError(
                f"The server fails again and again: {error}. What is written stays: run again later."
            )
        if not self._has_answer and self._num_failures == MAX_INITIAL_FAILURES:
            raise UserError(
                f"None of the first {MAX_INITIAL_FAILURES} got a caption, the last one because {error}. "
                "Nothing more is tried. Try another model, or other options."
            )


def _print(lines: Sequence[str]) -> None:
    """Print lines with control codes made visible, because captions may contain them."""
    sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")


@dataclass(frozen=True)
class _CaptionEdit:
    """The text of one caption before and after editing."""

    location: CaptionLocation
    old: str
    new: str  # "" if a caption would become empty
    line_change: LineChange | None = None  # for a caption in a line of a list


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
        OptionError: If words would have to be added to a JSON object of unknown format.
    """
    locations = find_caption_locations(config, reads_captions=True)
    records = read_generated_captions(locations)
    all_edits = list(_list_edits(locations, wording, format))
    edits = [edit for edit in all_edits if edit.new]
    emptied = [edit for edit in all_edits if not edit.new]
    if dry_run:
        lines = [
            f"{edit.location.display_path}: {_shorten(edit.old)!r} -> {_shorten(edit.new)!r}"
            for edit in edits
        ]
        head = f"{format_count(len(edits), 'caption')} would be changed. Nothing is written."
        _print([head, *first_lines(lines, LISTED_EDITS)])
    else:
        _write_edits(edits, records)
        unchanged = f"{len(locations) - len(edits)} are unchanged"
        show_box("Editing is finished", [("captions", f"{len(edits)} changed, {unchanged}")])
    if emptied:
        raise DatasetError(
            f"{format_count(len(emptied), 'caption')} would become empty and are not changed, such as "
            f"{emptied[0].location.display_path}: {shorten(emptied[0].old, SHOWN)!r}. Write them by hand, "
            "or remove them and generate new ones."
        )


def _shorten(caption: str) -> str:
    """Shorten a caption to one line of at most SHOWN characters."""
    return shorten(" / ".join(caption.split("\n")), SHOWN)


def _write_edits(edits: Sequence[_CaptionEdit], records: Mapping[Path, GeneratedCaptions]) -> None:
    """Write edited captions: text files one by one, then each list once."""
    changes_by_list: dict[CaptionList, dict[str, LineChange]] = defaultdict(dict)
    for edit in edits:
        location = edit.location
        record = records[location.file.parent]
        # an edited caption that this program generated still counts as generated
        if record.contains(location.name, edit.old):
            record.add(location.name, edit.new)
        if location.caption_list is None:
            keep_backup(location.file)
            write_text(location.file, edit.new)
        else:
            assert edit.line_change is not None
            changes_by_list[location.caption_list][location.listed_path] = edit.line_change
    for caption_list, changes in changes_by_list.items():
        # the old list is always backed up, as its captions may be a person's
        caption_list.write(changes, is_hand_written=True)


def _list_edits(
    locations: Sequence[CaptionLocation], wording: WordingOptions, format: CaptionFormat | None
) -> Iterator[_CaptionEdit]:
    """Yield the old and the new text of each caption that the wording options change."""
    # `format` is the format of captions that are JSON objects; None if none is chosen.
    for location in locations:
        reword_text = partial(_reword_text, location=location, wording=wording, format=format)
        has_several = location.source.table.captions.multi_caption
        if location.caption_list is None:
            # Without a caption or a change there is nothing to edit. `has_several`: each line is a caption.
            if location.caption is None:
                edit = None
            else:
                captions = split_lines(location.caption) if has_several else [location.caption]
                # a caption that becomes empty loses its line
                text = "\n".join(filter(None, map(reword_text, captions)))
                edit = None if text == location.caption else _CaptionEdit(location, location.caption, text)
        else:
            edit = _edit_list_line(location, has_several, reword_text)
        if edit is not None:
            yield edit


def _reword_text(
    caption: str, location: CaptionLocation, wording: WordingOptions, format: CaptionFormat | None
) -> str:
    """Apply the wording options to a plain caption, or to each text in a JSON caption."""
    content = read_if_object(caption)
    if content is None:
        return reword(caption, wording)
    _require_main_text(location, content, wording, format)
    return write_object(reword_object(content, wording, "" if format is None else format.main))


def _require_main_text(
    location: CaptionLocation,
    content: Mapping[str, Any],
    wording: WordingOptions,
    format: CaptionFormat | None,
) -> None:
    """Raise OptionError if a trigger word, prefix or suffix has no text in a JSON caption to be added to."""
    if not (wording.trigger_word or wording.caption_prefix or wording.caption_suffix):
        return
    start = (
        f"{location.display_path}: its caption is a JSON object, which --trigger_word, --caption_prefix and "
    )
    if format is None:
        formats = ", ".join(caption_formats())
        raise OptionError(
            f"{start}--caption_suffix would break. Name its format by --caption_format ({formats}), and "
            "they are added to its main text"
        )
    if format.main not in content:
        raise OptionError(
            f"{start}--caption_suffix put into {format.main}, and it has none. Write it there by hand"
        )


def _edit_list_line(
    location: CaptionLocation, has_several: bool, reword_text: Callable[[str], str]
) -> _CaptionEdit | None:
    """Return the edit of a caption in a line of a list; None if the wording options change nothing."""
    # `has_several` says that the line may have several captions under the key "captions". An edit with an
    # empty new text is reported and not written.
    assert location.caption_list is not None
    line = location.caption_list.read_line(location.listed_path)
    change = LineChange({}, {})
    for key in ("caption", "captions") if has_several else ("caption",):
        value = line.get(key)  # a text or a list of texts
        if value is None:
            continue
        if isinstance(value, str):
            reworded: str | list[str] = reword_text(value)
        else:
            reworded = [reword_text(text) for text in value]
        if reworded != value:
            change.old[key] = value
            change.new[key] = reworded
    if not change.new:
        return None
    new_texts = _list_texts(change.new)
    return _CaptionEdit(
        location,
        old="\n".join(_list_texts(change.old)),
        # one empty caption makes the whole line an edit that is not written
        new="\n".join(new_texts) if all(new_texts) else "",
        line_change=change,
    )


def _list_texts(values: Mapping[str, Any]) -> list[str]:
    """Return all texts in a mapping, whose values are texts or lists of texts."""
    texts: list[str] = []
    for value in values.values():
        texts += [value] if isinstance(value, str) else value
    return texts
