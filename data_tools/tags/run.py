"""Tag a folder after the options of tools/tag.py are read."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_tools.captions.asking import Answerer, Answers, Look
from data_tools.captions.places import EXTENSION, CaptionLocation, WhichCaptions
from data_tools.captions.run import CaptionMaker, look_at, try_captions, write_captions
from data_tools.folder_dataset import make_folder_dataset
from data_tools.tags.labels import has_mapping
from data_tools.tags.model import load_tagger
from data_tools.tags.options import TaggingOptions
from data_tools.tags.words import extend_caption, read_choice
from dataset.config import DatasetConfig, load_dataset_config
from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from modules.run_limits import temporary_folder
from modules.text_files import read_if_object

MAX_PIXELS = 4096**2  # of a frame that is looked at


def tag_folder(options: TaggingOptions) -> None:
    """Tag the images and clips of a dataset, and write the tags as captions.

    Raises:
        UserError: If the dataset or the tagger cannot be used, or if files got no tags.
    """
    with temporary_folder() as temporary:
        config = _read_config(options, temporary)
    tag_counts: Counter[str] = Counter()
    separator = options.words.caption_separator
    choice = read_choice(options, sorts=has_mapping(options.tagger.model_dir))

    def load() -> Answerer:
        """Load the tagger, and return its function that answers with tags."""
        tagger = options.tagger
        loaded = load_tagger(
            tagger.model_dir,
            batch_size=tagger.batch_size,
            joins_by_mean=tagger.join_frames == "mean",
            max_frames=tagger.num_frames,
        )
        return _counted(loaded.answerer(choice, separator), separator, tag_counts)

    def finish(location: CaptionLocation, answer: str) -> str:
        """Return the caption to write: the new tags, appended to the existing caption with --append_tags."""
        if not options.append_tags or not location.caption:
            return answer
        if read_if_object(location.caption) is not None:
            raise OptionError(
                f"{location.media}: its caption is a JSON object, which --append_tags would break. Tag a "
                "folder without such captions, or write them with tools/caption_dataset.py --caption_format"
            )
        tags = answer.split(separator)
        if location.source.table.multi_caption:  # each line is a caption of its own
            lines = filter(str.strip, location.caption.splitlines())
            return "\n".join(extend_caption(line, tags, separator) for line in lines)
        return extend_caption(location.caption, tags, separator)

    maker = CaptionMaker(
        name=str(options.tagger.model_dir),
        pass_id=_make_pass_id(options),
        rewritten=WhichCaptions(
            ours=options.overwrite,
            all=options.overwrite_all or options.append_tags,
            empty=options.fill_empty,
        ),
        load=load,
        look=lambda location: look_at(location, options.tagger.num_frames, MAX_PIXELS),
        finish=finish,
    )
    try:
        if options.try_on is not None:
            try_captions(config, maker, options.try_on)
        else:
            write_captions(config, maker, options.dry_run)
    finally:
        if options.frequency_tags:
            lines = [f"{count:6} {tag}" for tag, count in tag_counts.most_common()]
            sys.stdout.write(escape_control_codes("\n".join(["tags found in this run:", *lines])) + "\n")


def _counted(answerer: Answerer, separator: str, found: Counter[str]) -> Answerer:
    """Wrap an answerer in order to count the tags in its answers in `found`."""

    def answer(locations: Sequence[CaptionLocation], look: Look) -> Answers:
        """Yield the tags of each location, and count how often each tag occurs."""
        with contextlib.closing(answerer(locations, look)) as answers:
            for location, text in answers:
                if isinstance(text, str):
                    found.update(text.split(separator))
                yield location, text

    return answer


def _make_pass_id(options: TaggingOptions) -> str:
    """Return a hash of the options that change tags: only runs with equal options continue each other."""
    records = (options.tagger, options.thresholds, options.words)
    info = [dataclasses.asdict(record) for record in records]
    info.append({"overwrite_all": options.overwrite_all, "append_tags": options.append_tags})
    info[0].pop("batch_size")  # it changes only the speed
    return hashlib.sha256(json.dumps(info, default=str).encode("utf-8")).hexdigest()


def _read_config(options: TaggingOptions, temporary: Path) -> DatasetConfig:
    """Read the dataset file to tag, or make a dataset of a folder.

    `temporary` is an empty folder, in which the dataset file for a folder is written.

    Raises:
        DatasetError: If there is nothing to tag.
    """
    if options.folder.is_file():  # a dataset file
        for name in ("recursive", "caption_extension"):
            if getattr(options, name):
                raise OptionError(f"--{name} is for a folder: the dataset's file says it")
        return load_dataset_config(options.folder)
    extension = options.caption_extension or EXTENSION
    return make_folder_dataset(options.folder, extension, options.recursive, temporary)
