"""Explain errors of torch's and Triton's compilers. Imported only after such an error may have happened."""

import os
import re
import sys
import tempfile
from pathlib import Path

from modules.control_codes import shorten
from modules.errors import is_compiler_error

MAX_CAUSE_LENGTH = 240  # characters of the compiler's own message


def explain_compilation(error: Exception) -> str | None:
    """Return cause and remedy of an error in torch's or Triton's compiler; None for other errors."""
    if not is_compiler_error(error):
        return None
    summary, _, output = str(error).partition("Output:\n")
    lines = [line.strip() for line in (output or summary).splitlines() if line.strip()]
    causes = [line for line in lines if re.search("error|cannot|not found", line, re.IGNORECASE)]
    cause = next(iter([*causes, *lines]), "no reason is given")
    # A folder of torch or compiled code in a failed command whose path has a space
    # None otherwise.
    # torch does not quote paths in compiler commands, so the compiler reads the path as two.
    torch_file = getattr(sys.modules.get("torch"), "__file__", None)
    folders = [os.environ.get("TORCHINDUCTOR_CACHE_DIR"), tempfile.gettempdir()]
    if torch_file is not None:
        folders.append(str(Path(torch_file).parent))
    folder = next((folder for folder in folders if folder and " " in folder and folder in summary), None)
    remedy = "Update the compiler (g++ or clang; on a GPU Triton) and its headers"
    if folder is not None:
        remedy = (
            f"{folder} has a space in its path, which breaks the compiler's command: use a folder without one"
        )
    return (
        f"compiling the blocks failed: {shorten(cause, MAX_CAUSE_LENGTH)}\n"
        f"  {remedy}. Or omit --compile, --dynamo_backend and --optimized"
    )
