"""Replace deleted files in a run's commands by saved files that exist."""

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
        _with_existing_files(command, run_history, folder, best if command.title == GENERATE else None)
        for command in run_history.commands
    ]


def _with_existing_files(
    command: PageCommand, run_history: RunHistory, folder: Path, best: str | None
) -> PageCommand:
    """Replace a file in a command by the best existing one if it was deleted or is not the best any more."""
    start = run_history.start
    base = Path(start.working_folder) if start is not None and start.working_folder else None
    try:
        words = shlex.split(command.bash)
    except ValueError:  # an edited history
        return command
    notes = []
    for index, word in enumerate(words):  # a word is replaced if it is a saved file of this run
        path = Path(word)
        # a relative path counts from the folder in which the training was started, if that is known
        if path.name not in run_history.saved or not (path.is_absolute() or base):
            continue
        if (base or folder) / path.parent != folder:
            continue  # a file of the same name in another folder
        best_step = None if best is None else run_history.saved[best]
        is_there = (folder / path.name).exists()
        if is_there and best_step in {None, run_history.saved[path.name]}:
            continue
        present = _find_replacement(path.name, run_history, folder, best)
        if present is None or (is_there and run_history.saved[present] != best_step):
            continue  # nothing to use, or nothing better than the file that is there
        words[index] = str(path.with_name(present))
        reason = "is not the best file" if is_there else "is not there any more"
        notes.append(f"{path.name} {reason}: {present} takes its place.")
    if not notes:
        return command
    note = " ".join([*dict.fromkeys(notes), command.note]).rstrip()
    return replace(command, bash=shlex.join(words), powershell=quote_for_powershell(words), note=note)


def _find_replacement(name: str, run_history: RunHistory, folder: Path, best: str | None) -> str | None:
    """Return the saved file to use instead of a missing one: that of the best step, else the newest.

    Only files of the same kind qualify: an average for an average, an embedding for an embedding, and the
    same expert.

    Args:
        name: Name of the file to replace.
        run_history: Content of the run's history.
        folder: Folder of the files.
        best: File of the best step; None if it is not known.
    """
    best = best or run_history.best_file(folder)
    best_step = None if best is None else run_history.saved[best]
    # `saved` has the step of each file
    candidates = [
        (step != best_step, -step, len(candidate), candidate)
        for candidate, step in run_history.saved.items()
        if run_history.is_average(candidate) == run_history.is_average(name)
        and run_history.is_embedding(candidate) == run_history.is_embedding(name)
        and _expert_of(candidate) == _expert_of(name)
        and (folder / candidate).is_file()
    ]
    return min(candidates)[-1] if candidates else None  # best step first, then the newest, the shortest name


def _expert_of(name: str) -> str:
    """Return the expert in a saved file's name; "" for a file for all experts."""
    return next((part for part in (LOW_NOISE, HIGH_NOISE) if Path(name).stem.endswith(f"_{part}")), "")
