"""Find a diffusers pipeline, in a folder or on the hub, and what its VAE is."""

from pathlib import Path

from huggingface_hub import snapshot_download

from modules.errors import CheckpointError, DownloadError, OptionError
from modules.text_files import parse_json, read_text

PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def find_model(model_id: str) -> Path:
    """Return the folder of a pipeline; one of the hub is downloaded, without its transformer.

    Raises OptionError if it is neither a folder nor a name on the hub, DownloadError if the hub fails.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    if model_id.count("/") != 1 or model_id.startswith((".", "/", "~")) or "\\" in model_id:
        raise OptionError(
            f"--model_id {model_id}: no such folder, and no name on the hub, such as THUDM/CogVideoX-2b"
        )
    patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:  # no network, no such name, no rights: many classes, one remedy
        lines = str(error).strip().splitlines()
        raise DownloadError(
            f"--model_id {model_id}: there is no such folder, and the hub has not answered: "
            f"{lines[0] if lines else type(error).__name__}\n  Give the folder of a pipeline."
        ) from error


def read_vae_class(folder: Path) -> str:
    """Return the class of a pipeline's VAE, as vae/config.json names it.

    Raises CheckpointError if the file is missing or says nothing, or if there is no text encoder.
    """
    if not (folder / "text_encoder").is_dir():
        raise CheckpointError(
            f"--model_id {folder} has no folder text_encoder. Give the folder of a diffusers pipeline, with "
            "vae, text_encoder and tokenizer.",
            folder,
        )
    path = folder / "vae" / "config.json"
    try:
        name = parse_json(read_text(path))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"--model_id {folder}: {path} does not say what the VAE is ({type(error).__name__}: {error}). "
            "Give the folder of a diffusers pipeline, with vae, text_encoder and tokenizer.",
            path,
        ) from error
    return str(name)
