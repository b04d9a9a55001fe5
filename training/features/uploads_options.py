"""Options for uploads to the Hugging Face hub."""

from modules.options import FREE, SECRET, SENDS, option, shared_with_run
from training.features.contract import AT_METADATA, FeatureOptions

_NOT_UPLOADED = "nothing is uploaded without --huggingface_repo_id"
_IF_UPLOADED = {_NOT_UPLOADED: lambda options: options.huggingface_repo_id is not None}


class UploadOptions(FeatureOptions, title="Hugging Face hub", at=AT_METADATA, facts=FREE):
    """Options of uploads to the Hugging Face hub, and of resuming from a state on the hub."""

    huggingface_repo_id: str | None = option(
        "upload each saved file to this repository (owner/name); it gets a model card if it has none",
        facts={
            **SENDS,
            **shared_with_run(
                "upload the trained files to this repository (owner/name); in run.toml it is rejected"
            ),
            "permission": "uploads the trained files to {}",
        },
    )
    huggingface_repo_type: str | None = option(
        "model (default), dataset or space", one_of=("model", "dataset", "space"), acts_if=_IF_UPLOADED
    )
    huggingface_path_in_repo: str | None = option("folder in the repository", acts_if=_IF_UPLOADED)
    huggingface_token: str | None = option(
        "access token; default: the one stored on this machine",
        acts_if={
            _NOT_UPLOADED: lambda options: (
                options.huggingface_repo_id is not None or options.resume_from_huggingface
            ),
        },
        facts=SECRET,
    )
    huggingface_repo_visibility: str | None = option(
        "public, else a new repository is private", one_of=("public", "private"), acts_if=_IF_UPLOADED
    )
    save_state_to_huggingface: bool = option("upload state folders as well", needs="huggingface_repo_id")
    resume_from_huggingface: bool = option(
        "--resume names owner/repo/path[:revision[:type]]",
        facts={**SENDS, "permission": "downloads a state from {}"},
    )
    async_upload: bool = option(
        "upload while training continues; only the final upload is waited for", needs="huggingface_repo_id"
    )
