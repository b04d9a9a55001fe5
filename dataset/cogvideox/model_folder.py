"""Find a diffusers pipeline, in a folder or on the hub, and the kind of its VAE."""

from pathlib import Path

from modules.checkpoints.model_files import find_model_folder
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text

PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def find_model(model_id: str) -> Path:
    """Return the folder of a pipeline; one of the hub is downloaded, without its transformer.

    Raises CheckpointError and DownloadError as `find_model_folder`.
    """
    patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
    return find_model_folder("--model_id", model_id, patterns)


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
