"""Upload saved files to the Hugging Face hub, or resume from a state there: --huggingface_repo_id.

The client and the model card are in `uploads_hub.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modules.option_values import require
from training.features.contract import Feature
from training.features.hooks import RunFeatures
from training.features.uploads_options import UploadOptions

if TYPE_CHECKING:
    from training.saving.files import Publisher


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, to which files are uploaded and from which states are loaded."""

    options: UploadOptions

    def make_publisher(self) -> "Publisher | None":
        """Return the uploader of saved files; None without --huggingface_repo_id."""
        if self.options.huggingface_repo_id is None:
            return None
        from training.features.uploads_hub import make_uploads  # only with uploads

        return make_uploads(self.options)

    def fetch_state(self, name: str, folder: Path) -> Path | None:
        """Download a state from the hub into `folder`; None without --resume_from_huggingface."""
        if not self.options.resume_from_huggingface:
            return None
        from training.features.uploads_hub import download_state  # only with a state on the hub

        return download_state(name, self.options.huggingface_token, folder)


def _join(run: RunFeatures, options: UploadOptions) -> None:
    if options.resume_from_huggingface:
        require(
            run.options.saving.resume,
            "--resume",
            "--resume_from_huggingface resumes from owner/repo/path[:revision[:type]]",
        )
    run.storage = Hub(options)


UPLOADS = Feature(
    name="uploads",
    options=UploadOptions,
    is_on=lambda options: options.huggingface_repo_id is not None or options.resume_from_huggingface,
    join=_join,
)
