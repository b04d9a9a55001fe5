"""Options of tools/tag.py."""

from pathlib import Path

from data_tools.captions.options import WritingOptions
from modules.errors import OptionError
from modules.options import Options, not_needed, option, unsupported
from modules.text_files import bad_character

MODEL_FOLDER = Path("models/wd_tagger")  # that tools/download.py fills
MAX_WORDS = 10_000  # characters of a list of tags


class TaggerOptions(Options, title="the tagger"):
    """Folder, batch size and frames of the tagger."""

    model_dir: Path = option(
        "folder with model.onnx and selected_tags.csv, or tag_mapping.json: a WD14-like tagger",
        default=MODEL_FOLDER,
    )
    batch_size: int = option("images that the tagger sees at a time", default=1, minimum=1, maximum=1024)
    num_frames: int = option(
        "frames of a clip that are tagged, evenly spaced; their tags are joined",
        default=8,
        minimum=1,
        maximum=1024,
    )
    join_frames: str = option(
        "probability of a tag in a clip: the maximum over its frames, or their mean, which ignores what is "
        "visible only briefly",
        default="max",
        choices=("max", "mean"),
    )
    onnx = not_needed("the tagger is always run by onnxruntime")
    repo_id = unsupported(
        "tools/download.py --family tools --task wd_tagger downloads a tagger, with its size and license "
        "first; any other one is a folder for --model_dir",
        nargs="?",
    )
    force_download = unsupported("tools/download.py downloads taggers; --verify compares what is there")
    max_data_loader_n_workers = not_needed("files are always read ahead", nargs="?")


class ThresholdOptions(Options, title="which tags are taken"):
    """Minimum probability of a tag, for each category."""

    thresh: float = option("least probability of a tag", default=0.35, minimum=0, maximum=1)
    general_threshold: float | None = option("the same, of what is seen; --thresh", minimum=0, maximum=1)
    character_threshold: float | None = option("the same, of characters; --thresh", minimum=0, maximum=1)
    copyright_threshold: float | None = option(
        "the same, of series and brands; --thresh", minimum=0, maximum=1
    )
    artist_threshold: float | None = option("the same, of artists; --thresh", minimum=0, maximum=1)
    meta_threshold: float | None = option("the same, about the file itself; --thresh", minimum=0, maximum=1)
    model_threshold: float | None = option("the same, of image models; --thresh", minimum=0, maximum=1)
    use_rating_tags: bool = option("put the most probable rating first")
    use_rating_tags_as_last_tag: bool = option("put it last", excludes="use_rating_tags")
    use_quality_tags: bool = option("put the most probable quality first, if the tagger has qualities")
    use_quality_tags_as_last_tag: bool = option("put it last", excludes="use_quality_tags")
    undesired_tags: str = option("tags never written, with --caption_separator between them", default="")


class TagWordOptions(Options, title="the text that is written"):
    """How tags are spelled and in which order they are written."""

    remove_underscore: bool = option(
        "replace underscores with spaces, except in emoticons such as ^_^ and (o)_(o)"
    )
    character_tags_first: bool = option("put characters before all that is seen")
    character_tag_expand: bool = option("write name_(series) as two tags: name, series")
    always_first_tags: str = option(
        "tags put at the beginning, in this order, where they are found", default=""
    )
    tag_replacement: str = option(
        r"tags to write as others: a,b;c,d is b for a and d for c; \, and \; are signs of a tag",
        default="",
    )
    caption_separator: str = option('between two tags; default: ", "', default=", ")


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
