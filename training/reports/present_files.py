"""Replace deleted files in a run's commands with saved files that exist."""

import shlex
from dataclasses import replace
from pathlib import Path

from modules.command import quote_for_powershell
from protocols.families import HIGH_NOISE, LOW_NOISE
from training.reports.history import PageCommand, RunHistory
from training.reports.scores import find_best_file

GENERATE = "Generate with it"  # title of the command that takes the best file


def current_commands(run_history: RunHistory, folder: Path, name: str = "") -> list[PageCommand]:
    """Return the commands of a run; a deleted saved file is replaced by an existing one of its kind.

    The command that generates uses the best file, which new scores or validations may have changed since the
    run.

    Args:
        run_history: Content of the run's history.
        folder: Folder of the run's files.
        name: Name of the run's files; if it is "", scores are not read.
    """
    best_file = find_best_file(folder, name, run_history) if name else None
    best = None if best_file is None else best_file.name
    return [
        _replace_missing_files(command, run_history, folder, best if command.title == GENERATE else None)
        for command in run_history.commands
    ]


def _replace_missing_files(
    command: PageCommand, run_history: RunHistory, folder: Path, best: str | None
) -> PageCommand:
    """Replace saved files in a command with the best existing one if they are deleted or not the best."""
    try:
        arguments = shlex.split(command.bash)
    except ValueError:  # an edited history
        return command
    notes = []
    for index, argument in enumerate(arguments):
        path = Path(argument)
        if not _is_saved_file(path, run_history, folder):
            continue
        exists = (folder / path.name).exists()
        if exists:
            replacement = _find_better_file(path.name, run_history, folder, best)
            reason = "is not the best file"
        else:
            replacement = _find_replacement(path.name, run_history, folder, best)
            reason = "is not there any more"
        if replacement is None:
            continue
        arguments[index] = str(path.with_name(replacement))
        notes.append(f"{path.name} {reason}: {replacement} takes its place.")
    if not notes:
        return command
    note = " ".join([*dict.fromkeys(notes), command.note]).rstrip()
    return replace(command, bash=shlex.join(arguments), powershell=quote_for_powershell(arguments), note=note)


def _is_saved_file(path: Path, run_history: RunHistory, folder: Path) -> bool:
    """Return whether the path in a command is a file that the run has saved, in the run's own folder."""
    if path.name not in run_history.saved:
        return False
    start = run_history.start
    # a relative path counts from the folder in which the training was started, if that is known
    working_folder = Path(start.working_folder) if start is not None and start.working_folder else None
    if working_folder is None and not path.is_absolute():
        return False
    return (working_folder or folder) / path.parent == folder


def _find_better_file(name: str, run_history: RunHistory, folder: Path, best: str | None) -> str | None:
    """Return the best step's file of the same kind as file `name`."""
    # Returns None if `name` is from the best step itself, or if no file of the same kind is left of that
    # step.
    if best is None:
        return None
    best_step = run_history.saved[best]
    if run_history.saved[name] == best_step:
        return None
    replacement = _find_replacement(name, run_history, folder, best)
    # no file of the same kind may be left of the best step
    is_from_best_step = replacement is not None and run_history.saved[replacement] == best_step
    return replacement if is_from_best_step else None


def _find_replacement(name: str, run_history: RunHistory, folder: Path, best: str | None) -> str | None:
    """Return the saved file to use instead of a missing one: the best step's file, else the newest."""
    # Only files of the same kind qualify: an average for an average, an embedding for an embedding, and the
    # same expert.
    best = best or run_history.best_file(folder)
    best_step = None if best is None else run_history.saved[best]
    candidates = []  # sorted by: best step first, then the newest, the shortest name
    for candidate, step in run_history.saved.items():
        is_same_kind = (
            run_history.is_average(candidate) == run_history.is_average(name)
            and run_history.is_embedding(candidate) == run_history.is_embedding(name)
            and _parse_expert(candidate) == _parse_expert(name)
        )
        if is_same_kind and (folder / candidate).is_file():
            candidates.append((step != best_step, -step, len(candidate), candidate))
    if not candidates:
        return None
    _, _, _, replacement = min(candidates)
    return replacement


def _parse_expert(name: str) -> str:
    """Return the expert named at the end of a saved file's name; "" if it names none."""
    return next((part for part in (LOW_NOISE, HIGH_NOISE) if Path(name).stem.endswith(f"_{part}")), "")
