"""Prompts that name the file of a JSON object: `@caption.json`. Standard library only."""

from generation.prompt_lines import read_prompt_file
from modules.errors import OptionError
from modules.option_values import to_path
from modules.run_limits import is_limited
from modules.text_files import read_object


def read_named_object(text: str) -> str:
    """Return the content of the file that `@caption.json` names, or any other text as it is.

    Raises OptionError if the file cannot be read, or holds no JSON object, or if a page made the command: its
    reader may not be allowed to read files.
    """
    name = text.strip()
    if not (name.startswith("@") and name.lower().endswith(".json")):
        return text
    if is_limited():
        raise OptionError(f"--prompt {name}: files are read for commands that you type. Give the JSON itself")
    content = read_prompt_file(to_path("--prompt", name[1:]), "--prompt @")
    try:
        read_object(content)
    except ValueError as error:
        raise OptionError(
            f"--prompt {name}: {error}. Give a file with one JSON object, such as a caption"
        ) from None
    return content.strip()
