"""The number of groups in a VAE's group norms, which no tensor tells."""

from collections.abc import Collection, Iterable

from modules.checkpoints.opening import Checkpoint
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text


def stated_groups(checkpoint: Checkpoint, classes: Collection[str]) -> int | None:
    """Return the number in the config.json beside the file; None if it has none or is of another model.

    classes: names that `_class_name` has for this model. Raises CheckpointError if the file cannot be read or
    its number is below 1.
    """
    path = (checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent) / "config.json"
    if not path.is_file():
        return None
    try:
        settings = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Copy it again, or remove it.", path
        ) from error
    if (
        not isinstance(settings, dict)
        or settings.get("_class_name") not in classes
        or "norm_num_groups" not in settings
    ):
        return None
    groups = settings["norm_num_groups"]
    if type(groups) is not int or groups < 1:
        raise CheckpointError(f'{path}: "norm_num_groups" is {groups!r}, it must be 1 or more.', path)
    return groups


def check_groups(checkpoint: Checkpoint, widths: Iterable[int], groups: int) -> None:
    """Raise CheckpointError if one of the widths, in channels, cannot be divided into the groups."""
    uneven = next((width for width in widths if width % groups), None)
    if uneven is not None:
        raise CheckpointError(
            f"{checkpoint.path}: {uneven} channels cannot be divided into {groups} norm groups. "
            'Write the number of groups as "norm_num_groups" into the config.json beside the file.',
            checkpoint.path,
        )
