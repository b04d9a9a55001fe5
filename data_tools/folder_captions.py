"""Caption the images of a folder by the options of finetune/make_captions.py."""

from pathlib import Path

from data_tools.captions.options import (
    ApiOptions,
    AskOptions,
    CaptioningOptions,
    CaptionModelOptions,
    WordingOptions,
    WritingOptions,
)
from data_tools.captions.run import run_captioning
from data_tools.folder_dataset import make_folder_dataset
from modules.options import not_needed, option, unsupported
from modules.run_limits import temporary_folder

_BY_TEMPERATURE = "tools/caption_dataset.py draws words with --temperature"


class FolderCaptionOptions(WritingOptions, title="what to do"):
    """Options of finetune/make_captions.py."""

    train_data_dir: Path = option("folder of images", positional=True, place="folder")
    caption_extension: str = option(
        "suffix of the caption files",
        default=".caption",
        flags=("--caption_extension", "--caption_extention"),
    )
    recursive: bool = option("also caption the folders below")
    max_length: int = option("most tokens of a caption", default=75, minimum=1, maximum=32_768)
    model: CaptionModelOptions
    api: ApiOptions
    caption_weights = unsupported(
        "weights of BLIP are a pickle, which can hold code. Give the folder of a vision-language model to "
        "--model",
        type=str,
    )
    beam_search = unsupported(f"the most probable word is taken each time; {_BY_TEMPERATURE}")
    num_beams = unsupported(f"there is no beam search; {_BY_TEMPERATURE}", type=int)
    top_p = unsupported(f"words are not drawn here; {_BY_TEMPERATURE}", type=float)
    min_length = unsupported("a model ends its sentences by itself", type=int)
    seed = not_needed("nothing is drawn.", type=int)
    max_data_loader_n_workers = not_needed("files are always read ahead", nargs="?")
    debug = unsupported("--try_on 3 prints the captions of three files")


def caption_folder(options: FolderCaptionOptions) -> None:
    """Write a caption for each image of a folder that has none.

    Raises:
        UserError: If something is unusable, or captions failed.
    """
    with temporary_folder() as temporary:
        config = make_folder_dataset(
            options.train_data_dir, options.caption_extension, options.recursive, temporary
        )
    captioning = CaptioningOptions.usual(
        dataset_config=options.train_data_dir,
        dry_run=options.dry_run,
        try_on=options.try_on,
        overwrite=options.overwrite,
        overwrite_all=options.overwrite_all,
        fill_empty=options.fill_empty,
        model=options.model,
        api=options.api,
        ask=AskOptions.usual(max_new_tokens=options.max_length),
        wording=WordingOptions.usual(),
    )
    run_captioning(config, captioning)
