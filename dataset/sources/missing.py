"""Explain where a path in a dataset file was looked for, and from which folder it would be found."""

from pathlib import Path

from modules.command import quote_for_shell
from modules.paths import describe_lookup, explain_missing, path_exists
from modules.text_files import real_path


def explain_lookup(path: Path, config_path: Path | None) -> str:
    """Return the end of a message about a missing path: where it was looked for, and a hint.

    It begins with " (looked for at ...)" for a relative path, otherwise with the period of the sentence.

    Args:
        path: The path, as written in the dataset file.
        config_path: The dataset file; None if no file names the path.
    """
    if path_exists(path):  # it exists but cannot be opened: no hint about its name
        return ". Correct the path."
    hint = "" if config_path is None else find_relative_path_hint(path, config_path)
    hint = hint or explain_missing(path) or " Correct the path."
    return f"{describe_lookup(path)}.{hint}"


def find_relative_path_hint(path: Path, config_path: Path) -> str:
    """Return a hint if a relative path exists in the dataset file's folder; otherwise ""."""
    folder = real_path(config_path.parent)
    if path.is_absolute() or folder == Path.cwd() or not path_exists(folder / path):
        return ""
    move = quote_for_shell(["cd", str(folder)])
    return f" Relative paths start in the current folder: to start in the file's folder, first `{move}`."
