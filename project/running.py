"""Run the commands of a described folder, one after the other, until one fails."""

import signal
import subprocess
import sys
from pathlib import Path

from downloads.listing import print_lines
from modules.command import INTERRUPTED, as_typed
from modules.errors import OptionError
from modules.installation import find_script, program_words
from modules.text_files import parse_toml, read_text
from project.options import RUN_FILE, RunOptions
from training.config_options import OTHERS_TABLE
from training.saving.states import find_latest


def run_project(options: RunOptions) -> None:
    """Check, download, cache and train; end with the path of the training's page.

    Raises OptionError if the folder is not described, or if files of the model are missing and may not be
    downloaded. Exits with the code of the first command that fails.
    """
    path = options.folder / RUN_FILE
    try:
        tables = parse_toml(read_text(path))
        own, values = tables[OTHERS_TABLE], tables["training"]
        download, *commands = [[str(word) for word in words] for words in own["commands"]]
        missing = [name for name in own["files"] if not Path(name).exists()]
        output, name = Path(values["output_dir"]), str(values["output_name"])
    except FileNotFoundError:
        words = as_typed(["python", "new_project.py", str(options.folder)])
        raise OptionError(f"{path}: there is no such file. Describe the folder first: {words}") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise OptionError(
            f"{path} is not as `new` writes it ({error}). Correct it, or run `new` again."
        ) from None
    if find_latest(output, name) is not None:
        commands[-1] += ["--resume", "latest"]
    commands = [download, *commands] if missing else commands
    if missing and not (options.download or options.dry_run):
        raise OptionError(f"{missing[0]} is missing. Add --download, or run\n  {as_typed(download)}")
    for words in commands:
        print_lines(["", f"$ {as_typed(words)}"])
        sys.stdout.flush()
        code = 0 if options.dry_run else run_command(words)
        if code:
            raise SystemExit(code)
    print_lines(["", f"The page of the training: {output / name}.html"])


def run_command(words: list[str]) -> int:
    """Run a command of ours as a program and return its exit code.

    Ctrl-C reaches it from the terminal; this process waits for its end. Raises OptionError if it is no script
    of ours.
    """
    script = find_script("".join(words[1:2]))
    if words[:1] != ["python"] or script is None:
        raise OptionError(f"{as_typed(words)} is no command of this program. Correct {RUN_FILE}.")
    interrupts: list[int] = []
    with subprocess.Popen([sys.executable, *program_words(script), *words[2:]]) as process:
        # set after the start: a program inherits what is ignored
        kept = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        ended = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, kept)
            signal.signal(signal.SIGTERM, ended)
    return INTERRUPTED if interrupts else abs(code)
