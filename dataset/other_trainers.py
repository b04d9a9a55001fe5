"""Recognize the dataset files of other trainers, and say what to write instead. Standard library only."""

from collections.abc import Mapping
from typing import Any

from modules.command import quote_command

_A_FOLDER = "image_directory or video_directory"
# key that only files of another trainer have -> name of the trainer, and how its keys are called here
OTHER_TRAINER_KEYS: Mapping[str, tuple[str, str]] = {
    "directory": (
        "diffusion-pipe",
        f"[[directory]] is [[datasets]], its path {_A_FOLDER}; resolutions is resolution, enable_ar_bucket "
        "enable_bucket, frame_buckets target_frames; num_repeats is the same",
    ),
    "folder_path": (
        "AI Toolkit",
        f'folder_path is {_A_FOLDER}, caption_ext = "txt" is caption_extension = ".txt", num_frames is '
        "target_frames = [33], control_path control_directory, mask_path mask_directory, default_caption "
        "class_tokens; a list of resolutions takes a table for each",
    ),
    "instance_data_dir": (
        "SimpleTuner",
        f"each backend is a [[datasets]] table, its instance_data_dir {_A_FOLDER}, cache_dir_vae "
        'cache_directory, repeats num_repeats; caption_strategy = "textfile" is caption_extension = ".txt"',
    ),
    "concepts": ("OneTrainer", f"each concept is a [[datasets]] table, its path {_A_FOLDER}"),
}
AT_TOP = {"directory", "concepts"}  # keys of OTHER_TRAINER_KEYS that are just typing errors inside a table


def explain_yaml_suffix(suffix: str) -> str:
    """Return a hint about YAML files, which other trainers use; "" for any other suffix."""
    is_yaml = suffix.lower() in {".yaml", ".yml"}
    if not is_yaml:
        return ""
    command = quote_command(["python", "reelsmith.py", "new", "FOLDER", "--from", "FILE.yaml"])
    return f". Files of AI Toolkit are no datasets: {command} takes them over. {_translate('folder_path')}"


def find_trainer_hint(content: Any) -> str:
    """Return a hint about the trainer that wrote a file, and the keys to use instead; "" if unknown."""
    keys: list[str] = []
    tables = content  # the top level of some JSON files is a list
    if isinstance(content, dict):
        keys += content
        tables = content.get("datasets")
    if isinstance(tables, list):
        for table in tables:
            if isinstance(table, dict):
                keys += [key for key in table if key not in AT_TOP]
    for key in keys:
        if key in OTHER_TRAINER_KEYS:
            trainer, _ = OTHER_TRAINER_KEYS[key]
            return f"It seems to be a file of {trainer}. {_translate(key)}"
    return ""


def _translate(key: str) -> str:
    """Return the hint to write a new file, with this program's keys for another trainer's `key`."""
    command = quote_command(["python", "reelsmith.py", "new", "FOLDER"])
    _, our_keys = OTHER_TRAINER_KEYS[key]
    return f"Write a new file ({command} does it): {our_keys}."
