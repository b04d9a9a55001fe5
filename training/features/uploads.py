"""Upload what is saved to the Hugging Face hub, and continue from a state there: --huggingface_repo_id.

The client and the model card are in `uploads_hub.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from modules.option_values import require
from modules.options import FREE
from training.features.contract import AT_METADATA, Feature
from training.features.uploads_options import RunUploadOptions, UploadOptions

if TYPE_CHECKING:
    from training.features.hooks import OptionsOfRun
    from training.saving.files import Publisher


def _refuse(options: "OptionsOfRun") -> None:
    if options.of(UploadOptions).resume_from_huggingface:
        require(
            options.saving.resume,
            "--resume",
            "--resume_from_huggingface resumes from owner/repo/path[:revision[:type]]",
        )


def _make_publisher(options: UploadOptions) -> "Publisher | None":
    if options.huggingface_repo_id is None:
        return None
    from training.features.uploads_hub import make_uploads  # only with uploads

    return make_uploads(options)


def _fetch_state(options: UploadOptions, name: str, folder: Path) -> Path | None:
    if not options.resume_from_huggingface:
        return None
    from training.features.uploads_hub import download_state  # only with a state on the hub

    return download_state(name, options.huggingface_token, folder)


UPLOADS = Feature(
    name="uploads",
    options=UploadOptions,
    options_of_run=RunUploadOptions,
    place=AT_METADATA,
    is_on=lambda options: options.huggingface_repo_id is not None or options.resume_from_huggingface,
    facts=FREE,
    refuse=_refuse,
    publisher=_make_publisher,
    fetch_state=_fetch_state,
)
