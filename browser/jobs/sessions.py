"""Limit the process that the Generate page controls, because anybody may have written its command's file.

The files of render jobs are below a root. A folder from somebody else may contain such a file, and waiting
render jobs start together with the server. So only commands that the page itself could write are accepted.
"""

from collections.abc import Sequence
from pathlib import Path

from browser.jobs import launch
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.run_limits import is_in_queue, limit_variables
from modules.text_files import real_path
from package.reelsmith.commands import ScriptCommand
from protocols.families import with_scripts

INTERACTIVE = "--interactive"


def find_session(argv: Sequence[str], folder: Path) -> tuple[ScriptCommand, list[str]]:
    """Return the generation command of a process that loads a model and waits for requests, and its program.

    `argv` is the command line, `folder` its working folder. Raises OptionError if the page never writes such
    a command.
    """
    texts = [word for word in argv if isinstance(word, str)]
    line = shorten(" ".join(texts), 80)
    command, program = launch.find_program(texts, folder)
    scripts = {entry.generation_script for entry in with_scripts().values()}
    is_plain = texts[:1] == ["python"] and len(texts) == len(argv)
    if not is_plain or command.script not in scripts or INTERACTIVE not in texts:
        raise OptionError(f"{line}: the page Generate writes no such command. Remove it")
    return command, program


def limit_session(result_folder: Path, render_folder: Path, top: Path) -> dict[str, str]:
    """Return environment variables for a process that may write only below two folders, and send no data.

    Args:
        result_folder: Folder of its results.
        render_folder: Folder of the render jobs, which also contains previews.
        top: The root folder that must contain the results.

    Raises:
        OptionError: If the results would be outside `top`, or in the folder of the queue.
    """
    try:
        inside = real_path(result_folder).relative_to(real_path(top))
    except ValueError:  # outside the root, or an impossible folder name
        raise OptionError(f"{shorten(str(result_folder), 200)} lies outside of {top}. Remove it") from None
    if is_in_queue(inside):
        raise OptionError(f"{shorten(str(inside), 200)}: no results go into the queue's folder. Remove it")
    return limit_variables((result_folder, render_folder))
