"""Let the commands of a run name saved files that exist, after some were removed."""

import shlex
from dataclasses import replace
from pathlib import Path

from contract.families import HIGH_NOISE, LOW_NOISE
from modules.command import quote_for_powershell
from training.reports.history import PageCommand, Story


def present_commands(story: Story, folder: Path) -> list[PageCommand]:
    """Return the commands of a run; a saved file that is gone gives way to one of its kind that exists.

    folder: of the run's files.
    """
    return [_with_present_files(command, story, folder) for command in story.commands]


def _with_present_files(command: PageCommand, story: Story, folder: Path) -> PageCommand:
    start = story.start
    base = Path(start.working_folder) if start is not None and start.working_folder else None
    try:
        words = shlex.split(command.bash)
    except ValueError:  # an edited history
        return command
    notes = []
    for place, word in enumerate(words):
        path = Path(word)
        if path.name not in story.saved or not (path.is_absolute() or base):
            continue
        if (base or folder) / path.parent != folder or (folder / path.name).exists():
            continue
        present = _find_kin(path.name, story, folder)
        if present is not None:
            words[place] = str(path.with_name(present))
            notes.append(f"{path.name} is not there any more: {present} takes its place.")
    if not notes:
        return command
    note = " ".join([*dict.fromkeys(notes), command.note]).rstrip()
    return replace(command, bash=shlex.join(words), powershell=quote_for_powershell(words), note=note)


def _find_kin(name: str, story: Story, folder: Path) -> str | None:
    """Return the file to take for one that is gone: of the best step, else of the highest.

    It is an average, of one transformer alone, or of a word, if the lost file was.
    """
    best = story.best_file(folder)
    best_step = None if best is None else story.saved[best]
    candidates = [
        (step != best_step, -step, len(candidate), candidate)
        for candidate, step in story.saved.items()
        if story.is_average(candidate) == story.is_average(name)
        and story.is_of_word(candidate) == story.is_of_word(name)
        and _part_of(candidate) == _part_of(name)
        and (folder / candidate).is_file()
    ]
    return min(candidates)[-1] if candidates else None


def _part_of(name: str) -> str:
    """Return the transformer that a saved file is for, by its name; empty if it is for all."""
    return next((part for part in (LOW_NOISE, HIGH_NOISE) if Path(name).stem.endswith(f"_{part}")), "")
