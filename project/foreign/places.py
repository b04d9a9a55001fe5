"""Match the datasets listed in another trainer's file with the described folders."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dataset.config import KEYS
from dataset.subset_options import SUBSET_KEYS
from modules.text_files import real_path
from project.foreign.project import ForeignDataset, ForeignProject, find_beside

Size = tuple[int, int]  # width and height

_NOT_LEARNED = "it is not learned there"
_NOT_DESCRIBED = "its folder is not in the one that is described"
_OF_ALL_SUBSETS = "[[datasets.subsets]] of dataset.toml have one for all folders"


def join_datasets(project: ForeignProject) -> None:
    """Prepare the keys of a project's datasets for dataset.toml; a single folder's keys go to [general]."""
    for dataset in project.datasets.values():
        # None: all files are used in an epoch, each `num_repeats` times
        if dataset.files_per_epoch is not None:
            # for this program, the number of repeats is the number of files that it draws in an epoch
            dataset.files_per_epoch = dataset.table_keys.pop("num_repeats", None)
    for dataset in project.datasets.values():
        if dataset.is_unused:
            _report_omitted_keys(project, dataset, dataset.table_keys, _NOT_LEARNED)
            if dataset.folder_key:
                project.folder_by_key.pop(dataset.folder_key, None)
                project.report_omitted_key(dataset.folder_key, _NOT_LEARNED)
    used = {
        table: dataset
        for table, dataset in project.datasets.items()
        if not dataset.is_unused and (dataset.path is not None or dataset.table_keys)
    }
    project.datasets = used
    _resolve_resolutions(project)
    if len({dataset.path for dataset in used.values()}) == 1:
        _move_to_general(project)


def _resolve_resolutions(project: ForeignProject) -> None:
    """Reduce each folder to its largest size, and use the largest of all as size in [general].

    A foreign project may list a folder as several datasets of different sizes.
    """
    largest_by_folder: dict[Path | None, Size] = {}
    sized_datasets = [dataset for dataset in project.datasets.values() if "resolution" in dataset.table_keys]
    for dataset in sized_datasets:
        size: Size = dataset.table_keys["resolution"]
        known = largest_by_folder.get(dataset.path, size)
        largest_by_folder[dataset.path] = max(known, size, key=_count_pixels)
    for dataset in sized_datasets:
        if dataset.table_keys["resolution"] != largest_by_folder[dataset.path]:
            _report_omitted_keys(
                project, dataset, ["resolution"], "of several sizes of a folder the largest is taken"
            )
        dataset.table_keys["resolution"] = largest_by_folder[dataset.path]
    if not sized_datasets:
        return
    # if all datasets have a size, the project's general one has no effect
    if "resolution" in project.general_keys and len(sized_datasets) == len(project.datasets):
        _omit_general_key(project, "resolution")
    # the size of all tables; folders that have the same one need no key of their own
    general_size = project.general_keys.setdefault(
        "resolution", max(largest_by_folder.values(), key=_count_pixels)
    )
    for dataset in sized_datasets:
        # reports name the first key that gave a size
        project.source_keys.setdefault("resolution", dataset.source_keys["resolution"])
        if dataset.table_keys["resolution"] == general_size:
            dataset.table_keys.pop("resolution")


def _count_pixels(size: Size) -> int:
    width, height = size
    return width * height


def _move_to_general(project: ForeignProject) -> None:
    """Move the keys of the only dataset folder to [general], where they have precedence."""
    moved: set[str] = set()  # keys that an earlier dataset of the folder has set
    for dataset in project.datasets.values():
        for name, value in dataset.table_keys.items():
            if name in moved and project.general_keys[name] != value:  # the folder is listed twice
                _report_omitted_keys(
                    project,
                    dataset,
                    [name],
                    f"{name} of the same folder is {project.general_keys[name]} already",
                )
                continue
            if name in project.general_keys and name not in moved and project.general_keys[name] != value:
                _omit_general_key(project, name)  # the folder's own value replaces that of all tables
            moved.add(name)
            project.general_keys[name] = value
            project.source_keys[name] = dataset.source_keys[name]
        dataset.table_keys = {}


def _omit_general_key(project: ForeignProject, name: str) -> None:
    """Remove a key from the [general] table, because each folder has its own value."""
    project.general_keys.pop(name)
    key = project.source_keys.pop(name, name)
    project.remove_from_report(key)
    if key in project.assumed_defaults:
        project.assumed_defaults.pop(key)
    else:
        project.report_omitted_key(key, "the folders of its list have their own")


def find_table_keys(
    project: ForeignProject, folder: Path, media_folders: Collection[Path]
) -> dict[Path, dict[str, Any]]:
    """Return the keys that a project has for each folder; report keys for other folders.

    `folder` is the dataset folder; `described` are the folders in it with media.
    """
    keys: dict[Path, dict[str, Any]] = {}
    matched: list[ForeignDataset] = []
    for subfolder in media_folders:
        dataset = _find_dataset(project, folder, subfolder)
        keys[subfolder] = {} if dataset is None else dataset.table_keys
        if dataset is not None:
            matched.append(dataset)
    for dataset in project.datasets.values():
        # by identity: equal entries of the file are still separate datasets
        if not any(dataset is other for other in matched):
            _report_omitted_keys(project, dataset, dataset.table_keys, _NOT_DESCRIBED)
    return keys


def leave_sizes(project: ForeignProject) -> None:
    """Omit keys of single folders that only [[datasets]] tables accept, not their subsets."""
    for dataset in project.datasets.values():
        names = [name for name in dataset.table_keys if name not in SUBSET_KEYS]
        _report_omitted_keys(project, dataset, names, _OF_ALL_SUBSETS)
        for name in names:
            dataset.table_keys.pop(name)


def needs_subsets(data: Mapping[str, Any]) -> bool:
    """Return whether any of these dataset.toml keys requires the layout with subsets."""
    return any(name not in KEYS for name in data)


def _report_omitted_keys(
    project: ForeignProject, place: ForeignDataset, names: Collection[str], reason: str
) -> None:
    for name in names:
        key = place.source_keys.get(name, place.folder_key)
        project.remove_from_report(key)
        project.report_omitted_key(key, reason)


def _find_dataset(project: ForeignProject, folder: Path, place: Path) -> ForeignDataset | None:
    """Return the dataset of a folder: by its path, otherwise the only one with its name."""
    with_keys = [known for known in project.datasets.values() if known.path is not None and known.table_keys]
    for known in with_keys:
        found = find_beside(project.path, str(known.path))
        if found is not None and real_path(found) == real_path(place):
            return known
    named = [known for known in with_keys if known.path is not None and known.path.name == place.name]
    return named[0] if len(named) == 1 and place != folder else None
