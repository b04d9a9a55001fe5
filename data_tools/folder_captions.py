"""Caption a folder's images with the options of finetune/make_captions.py and make_captions_by_git.py."""

from pathlib import Path

from data_tools.captions.asking import AskOptions, WordingOptions
from data_tools.captions.local_model import CaptionModelOptions
from data_tools.captions.places import WritingOptions
from data_tools.captions.run import CaptioningOptions, run_captioning
from data_tools.captions.server import ApiOptions
from data_tools.folder_dataset import make_folder_dataset
from modules.options import Options, not_needed, option, unsupported
from modules.run_limits import temporary_folder

_BY_TEMPERATURE = "tools/caption_dataset.py draws words with --temperature"


class CaptionedFolderOptions(Options, title="what to do"):
    """The folder of images, and the suffix of their caption files."""

    train_data_dir: Path = option("folder of images", positional=True, place="folder")
    caption_extension: str = option(
        "suffix of the caption files",
        default=".caption",
        flags=("--caption_extension", "--caption_extention"),
    )
    recursive: bool = option("also caption the folders below")
    max_data_loader_n_workers = not_needed("files are always read ahead", nargs="?")
    debug = unsupported("--try_on 3 prints the captions of three files")


class FolderCaptionOptions(WritingOptions, CaptionedFolderOptions, title="what to do"):
    """Options for captioning the images in a folder."""

    max_length: int = option("most tokens of a caption", default=75, minimum=1, maximum=32_768)
    model: CaptionModelOptions
    api: ApiOptions
    caption_weights = unsupported(
        "weights of BLIP are a pickle, which can hold code. Pass the folder of a vision-language model to "
        "--model",
        type=str,
    )
    beam_search = unsupported(f"the most probable word is taken each time; {_BY_TEMPERATURE}")
    num_beams = unsupported(f"there is no beam search; {_BY_TEMPERATURE}", type=int)
    top_p = unsupported(f"words are not drawn here; {_BY_TEMPERATURE}", type=float)
    min_length = unsupported("a model ends its sentences by itself", type=int)
    seed = not_needed("nothing is drawn.", type=int)


class GitCaptionOptions(WritingOptions, CaptionedFolderOptions, title="what to do"):
    """Options for captioning the images in a folder with a GIT model."""

    model_id: str = option(
        "folder of a GIT model for transformers, or the name of its repository on Hugging Face",
        default="microsoft/git-large-textcaps",
    )
    batch_size: int = option("images described together", default=1, minimum=1, maximum=1024)
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")
    max_length: int = option("most tokens of a caption", default=50, minimum=1, maximum=32_768)
    remove_words: bool = option('remove from captions the text that an image contains: with the words "Hi"')
    pin_memory = not_needed("it changes only how images get to the GPU")


# phrases with which GIT describes writing in an image
_QUOTED = r"(\"[^\"]*\"|'[^']*'|\w+)"
_WRITTEN = (
    rf",? ?\b(has|with|and) the (words?|letters?|name|number) {_QUOTED}( (on|in) (the |his |her )?\w+)?",
    rf",? ?\b(with a sign )?that says {_QUOTED}( on it)?",
)


def caption_folder(options: FolderCaptionOptions) -> None:
    """Write captions for the images in a folder that have none.

    Raises:
        UserError: If the folder or the model cannot be used, or if captions failed.
    """
    _caption_as_dataset(options, options.model, options.api, WordingOptions.from_defaults())


def caption_folder_by_git(options: GitCaptionOptions) -> None:
    """Caption each image in a folder that has no caption file, with a GIT model.

    Raises:
        UserError: If the folder or the model cannot be used, or if captions failed.
    """
    model = CaptionModelOptions.from_defaults(
        model=options.model_id, batch_size=options.batch_size, device=options.device
    )
    wording = wording_without_writing(options)
    _caption_as_dataset(options, model, ApiOptions.from_defaults(), wording)


def wording_without_writing(options: GitCaptionOptions) -> WordingOptions:
    """Return the wording options for --remove_words: `a sign that says "Hi"` becomes `a sign`."""
    removed = tuple((pattern, "") for pattern in _WRITTEN) if options.remove_words else ()
    return WordingOptions.from_defaults(replace_regex=removed)


def _caption_as_dataset(
    options: FolderCaptionOptions | GitCaptionOptions,
    model: CaptionModelOptions,
    api: ApiOptions,
    wording: WordingOptions,
) -> None:
    """Caption the images in a folder as a dataset, which a temporary file describes."""
    # the dataset file is only needed until it is read
    with temporary_folder() as temporary:
        config = make_folder_dataset(
            options.train_data_dir, options.caption_extension, options.recursive, temporary
        )
    captioning = CaptioningOptions.from_defaults(
        dataset_config=options.train_data_dir,
        dry_run=options.dry_run,
        try_on=options.try_on,
        overwrite=options.overwrite,
        overwrite_all=options.overwrite_all,
        fill_empty=options.fill_empty,
        model=model,
        api=api,
        ask=AskOptions.from_defaults(max_new_tokens=options.max_length),
        wording=wording,
    )
    run_captioning(config, captioning)
