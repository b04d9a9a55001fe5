"""Prompts that name the file of a JSON object: `@caption.json`. Standard library only."""

from modules.errors import OptionError
from modules.option_values import to_path
from modules.paths import explain_missing, path_exists
from modules.run_limits import is_limited
from modules.text_files import read_object, read_text


def read_named_object(text: str) -> str:
    """Replace a prompt such as `@caption.json` by the contents of this file; return other text unchanged.

    Raises:
        OptionError: If the file cannot be read or is not a JSON object, or if this process runs a folder
            from someone else, whose prompts must not read files.
    """
    name = text.strip()
    if not (name.startswith("@") and name.lower().endswith(".json")):
        return text
    if is_limited():
        raise OptionError(f"--prompt {name}: files are read for commands that you type. Pass the JSON itself")
    path = to_path("--prompt", name[1:])
    try:
        content = read_text(path)
        read_object(content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        near = "" if path_exists(path) else explain_missing(path)
        raise OptionError(
            f"--prompt {name}: {reason or error}.{near} Pass a file with one JSON object, such as a caption"
        ) from None
    return content.strip()
