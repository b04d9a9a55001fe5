"""Limit the process that the page Generate drives: its command is read from a file, which may be anybody's.

The files of render jobs lie below a root. Whoever gives a folder away can put such a file into it, and render
jobs that wait are made when a server starts. So their commands can do no more than those that the page
writes.
"""

from collections.abc import Sequence
from pathlib import Path

from browser import launch
from contract.families import with_scripts
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.run_limits import is_in_queue, limit_variables
from modules.text_files import real_path
from package.reelsmith.commands import ScriptCommand

INTERACTIVE = "--interactive"


def find_session(words: Sequence[str], folder: Path) -> tuple[ScriptCommand, list[str]]:
    """Return the command of ours that a process for requests is started with, and its program.

    words, folder: as those of `launch.find_program`. Raises OptionError if it is another command than those
    of the page.
    """
    texts = [word for word in words if isinstance(word, str)]
    line = shorten(" ".join(texts), 80)
    command, program = launch.find_program(texts, folder)
    scripts = {entry.generation_script for entry in with_scripts().values()}
    is_plain = texts[:1] == ["python"] and len(texts) == len(words)
    if not is_plain or command.script not in scripts or INTERACTIVE not in texts:
        raise OptionError(f"{line}: the page Generate writes no such command. Remove it")
    return command, program


def limit_session(result_folder: Path, render_folder: Path, top: Path) -> dict[str, str]:
    """Return the variables for a process that may write below two folders alone, and sends nothing.

    result_folder: of its results. render_folder: of the render jobs, for previews. top: folder that is shown.
    Raises OptionError if the results would lie outside of it, or in the folder of the queue.
    """
    try:
        inside = real_path(result_folder).relative_to(real_path(top))
    except ValueError:  # outside, or of a name that no folder can have
        raise OptionError(f"{shorten(str(result_folder), 200)} lies outside of {top}. Remove it") from None
    if is_in_queue(inside):
        raise OptionError(f"{shorten(str(inside), 200)}: no results go into the queue's folder. Remove it")
    return limit_variables((result_folder, render_folder))
