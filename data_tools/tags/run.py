"""Tag a folder after the options of tools/tag.py are read."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_tools.captions.asking import Captioner, CaptionResults, ReadFrames
from data_tools.captions.places import DEFAULT_EXTENSION, CaptionLocation, OverwriteRules, WritingOptions
from data_tools.captions.run import CaptionBackend, fetch_frames, try_captions, write_captions
from data_tools.folder_dataset import make_folder_dataset
from data_tools.tags.labels import has_mapping
from data_tools.tags.model import TaggerOptions, load_tagger
from data_tools.tags.words import TagWordOptions, ThresholdOptions, extend_caption, make_tag_selection
from dataset.config import DatasetConfig, load_dataset_config
from dataset.sources.captions import Caption, split_lines
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.options import option, unsupported
from modules.run_limits import temporary_folder
from modules.text_files import bad_character

MAX_WORDS = 10_000  # characters of a list of tags

MAX_PIXELS = 4096**2  # maximum pixels of a frame


class TaggingOptions(WritingOptions, title="what to do"):
    """Which files are tagged, and where their tags are written."""

    folder: Path = option(
        "folder of images and clips, or a dataset's file (.toml, .json)", positional=True, place="there"
    )
    recursive: bool = option("also tag the folders below")
    caption_extension: str | None = option(
        "suffix of the caption files; default: .txt, or that of the dataset's file",
    )
    append_tags: bool = option(
        "put tags behind existing captions where they lack them; the captions as they were are kept as .bak",
        excludes=("overwrite", "overwrite_all", "fill_empty"),
    )
    frequency_tags: bool = option("print how often each tag was found")
    tagger: TaggerOptions
    thresholds: ThresholdOptions
    words: TagWordOptions
    caption_extention = unsupported("it is spelled --caption_extension", nargs="?")
    output_path = unsupported(
        "tags are written as captions. Run finetune/merge_dd_tags_to_metadata.py to collect them in one file",
        nargs="?",
    )
    debug = unsupported("--try_on 3 prints the tags of three files")

    def __post_init__(self) -> None:
        for name in ("always_first_tags", "tag_replacement", "caption_separator"):
            _check_words(name, getattr(self.words, name))
        _check_words("undesired_tags", self.thresholds.undesired_tags)
        if not self.words.caption_separator.strip():
            raise OptionError("--caption_separator is blank: tags could not be separated. Use a comma")
        extension = self.caption_extension
        if extension is not None and (not extension.startswith(".") or len(Path(f"a{extension}").parts) > 1):
            raise OptionError(f"--caption_extension {extension!r}: pass a suffix, such as .txt")


def _check_words(name: str, text: str) -> None:
    """Raise OptionError if the value of an option does not fit in one line of a caption."""
    character = bad_character(text)
    if character is not None:
        raise OptionError(f"--{name} contains {character}: set the terminal to UTF-8")
    if len(text) > MAX_WORDS or len(text.splitlines()) > 1:
        raise OptionError(f"--{name}: pass one line of at most {MAX_WORDS} characters")


def tag_folder(options: TaggingOptions) -> None:
    """Tag the images and clips of a dataset, and write the tags as captions.

    The tagger takes the place of a captioning model in `write_captions`, which selects the files to tag.

    Raises:
        UserError: If the dataset or the tagger cannot be used, or if files got no tags.
    """
    with temporary_folder() as temporary:
        config = _read_config(options, temporary)
    tag_counts: Counter[str] = Counter()
    separator = options.words.caption_separator
    selection = make_tag_selection(
        options.thresholds, options.words, sorts_by_probability=has_mapping(options.tagger.model_dir)
    )

    def load_captioner() -> Captioner:
        """Load the tagger; return the function that tags files, which also updates `tag_counts`."""
        tagger = load_tagger(
            options.tagger.model_dir,
            batch_size=options.tagger.batch_size,
            averages_frames=options.tagger.join_frames == "mean",
            max_frames=options.tagger.num_frames,
        )
        captioner = tagger.make_captioner(selection, separator)
        return partial(_caption_and_count, captioner, separator, tag_counts)

    def postprocess(location: CaptionLocation, tags: str) -> str:
        """Return the caption to write: the new tags, appended to the existing caption with --append_tags."""
        return _append_tags(location, tags, separator) if options.append_tags else tags

    backend = CaptionBackend(
        model_name=str(options.tagger.model_dir),
        options_hash=_hash_options(options),
        overwrite_rules=OverwriteRules(
            generated=options.overwrite,
            all=options.overwrite_all or options.append_tags,  # --append_tags changes existing captions
            empty=options.fill_empty,
        ),
        load_captioner=load_captioner,
        read_frames=lambda location: fetch_frames(location, options.tagger.num_frames, MAX_PIXELS),
        postprocess=postprocess,
    )
    try:
        if options.try_on is not None:
            try_captions(config, backend, options.try_on)
        else:
            write_captions(config, backend, options.dry_run)
    finally:  # also if the run fails: the counts so far
        if options.frequency_tags:
            lines = [f"{count:6} {tag}" for tag, count in tag_counts.most_common()]
            sys.stdout.write(escape_control_codes("\n".join(["tags found in this run:", *lines])) + "\n")


def _append_tags(location: CaptionLocation, new_tags: str, separator: str) -> str:
    """Return the caption at a location with new tags, joined by `separator`, appended where they are missing.

    Raises:
        OptionError: If the caption is a JSON object.
    """
    if not location.caption:
        return new_tags
    if Caption.of(location.caption).is_object:
        raise OptionError(
            f"{location.display_path}: its caption is a JSON object, which --append_tags would break. Tag a "
            "folder without such captions, or write them with tools/caption_dataset.py --caption_format"
        )
    tags = new_tags.split(separator)
    if location.source.table.captions.multi_caption:  # each line is a caption
        lines = split_lines(location.caption)
        return "\n".join(extend_caption(line, tags, separator) for line in lines)
    return extend_caption(location.caption, tags, separator)


def _caption_and_count(
    captioner: Captioner,
    separator: str,
    tag_counts: Counter[str],
    locations: Sequence[CaptionLocation],
    read_frames: ReadFrames,
) -> CaptionResults:
    """Yield the results of a tagger, and count the tags in them in `tag_counts`."""
    with contextlib.closing(captioner(locations, read_frames)) as results:
        for location, result in results:
            if isinstance(result, str):
                tag_counts.update(result.split(separator))
            yield location, result


def _hash_options(options: TaggingOptions) -> str:
    """Return a hash of the options that change tags; a run resumes another only if their hashes are equal."""
    tagger = dataclasses.asdict(options.tagger)
    tagger.pop("batch_size")  # it changes only the speed
    values = [
        tagger,
        dataclasses.asdict(options.thresholds),
        dataclasses.asdict(options.words),
        {"overwrite_all": options.overwrite_all, "append_tags": options.append_tags},
    ]
    return hashlib.sha256(json.dumps(values, default=str).encode("utf-8")).hexdigest()


def _read_config(options: TaggingOptions, temporary: Path) -> DatasetConfig:
    """Read the dataset file to tag, or make a dataset from a folder."""
    # `temporary` is an empty folder, in which the dataset file for a folder is written.
    if options.folder.is_file():  # a dataset file
        for name in ("recursive", "caption_extension"):
            if getattr(options, name):
                raise OptionError(f"--{name} is for a folder: the dataset file sets it")
        return load_dataset_config(options.folder)
    extension = options.caption_extension or DEFAULT_EXTENSION
    return make_folder_dataset(options.folder, extension, options.recursive, temporary)
