"""Match the datasets listed in another trainer's file with the described folders."""

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

from dataset.config import KEYS
from dataset.subset_options import DATASET, SUBSET_KEYS
from modules.text_files import real_path
from project.foreign.contract import join_sizes
from project.foreign.project import ForeignDataset, ForeignProject, find_beside

_NOT_LEARNED = "it is not learned there"
_NOT_DESCRIBED = "its folder is not in the one that is described"
_NOT_PER_SUBSET = "[[datasets.subsets]] of dataset.toml have one for all folders"


def join_datasets(project: ForeignProject) -> None:
    """Prepare another trainer's dataset keys for dataset.toml; a single folder's keys go to [general]."""
    used_datasets: dict[str, ForeignDataset] = {}
    for name, dataset in project.datasets.items():
        if dataset.draws_fixed_number:
            dataset.files_per_epoch = dataset.table_keys.pop("num_repeats", None)
        if dataset.is_unused:
            _report_omitted_keys(project, dataset, dataset.table_keys, _NOT_LEARNED)
            if dataset.folder_key:
                project.folder_by_key.pop(dataset.folder_key, None)
                project.report_omitted_key(dataset.folder_key, _NOT_LEARNED)
        elif dataset.path is not None or dataset.table_keys:
            used_datasets[name] = dataset
    project.datasets = _join_same_folders(project, used_datasets)
    _resolve_resolutions(project)
    if len(project.datasets) == 1:
        _move_to_general(project, *project.datasets.values())


def _join_same_folders(
    project: ForeignProject, datasets: Mapping[str, ForeignDataset]
) -> dict[str, ForeignDataset]:
    """Return the datasets with one entry for each folder, which has all sizes of the folder's entries."""
    # Some projects list a folder once for each size. Of other keys, the first value is used.
    first_by_folder: dict[Path | None, ForeignDataset] = {}
    joined: dict[str, ForeignDataset] = {}
    for name, dataset in datasets.items():
        first = first_by_folder.setdefault(dataset.path, dataset)
        if first is dataset:
            joined[name] = dataset
            continue
        if first.files_per_epoch is not None and dataset.files_per_epoch is not None:
            first.files_per_epoch += dataset.files_per_epoch
        for key, value in dataset.table_keys.items():
            known = first.table_keys.setdefault(key, value)
            first.source_keys.setdefault(key, dataset.source_keys[key])
            if key == "resolution":
                first.table_keys[key] = join_sizes([*known, *value])
            elif known != value:
                reason = f"{key} of the same folder is {known} already"
                _report_omitted_keys(project, dataset, [key], reason)
    return joined


def _resolve_resolutions(project: ForeignProject) -> None:
    """Set the sizes of the folder with the largest in [general]; only folders that differ keep their own."""
    sized_datasets = [dataset for dataset in project.datasets.values() if "resolution" in dataset.table_keys]
    if not sized_datasets:
        return
    # if all datasets have a size, the project's general one has no effect
    if "resolution" in project.general_keys and len(sized_datasets) == len(project.datasets):
        _omit_general_key(project, "resolution")
    # the sizes of a folder begin with its largest
    first = max(sized_datasets, key=lambda dataset: prod(dataset.table_keys["resolution"][0]))
    general_sizes = project.general_keys.setdefault("resolution", first.table_keys["resolution"])
    project.source_keys.setdefault("resolution", first.source_keys["resolution"])
    for dataset in sized_datasets:
        if dataset.table_keys["resolution"] == general_sizes:
            dataset.table_keys.pop("resolution")


def _move_to_general(project: ForeignProject, dataset: ForeignDataset) -> None:
    """Move the keys of the only dataset folder to [general], where they override the project's values."""
    general_keys = project.general_keys
    for name, value in dataset.table_keys.items():
        if name in general_keys and general_keys[name] != value:
            _omit_general_key(project, name)
        general_keys[name] = value
        project.source_keys[name] = dataset.source_keys[name]
    dataset.table_keys = {}


def _omit_general_key(project: ForeignProject, name: str) -> None:
    """Drop a key from the [general] table, because each folder has a value of its own."""
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
    """Return the dataset.toml keys that a project sets for each media folder; report those of other folders.

    `folder` is the dataset folder, `media_folders` are the folders in it that have media.
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


def omit_table_keys(project: ForeignProject) -> None:
    """Omit keys of single folders that are allowed in [[datasets]] tables, but not in subsets."""
    for dataset in project.datasets.values():
        names = [
            name
            for name in dataset.table_keys
            if name not in SUBSET_KEYS or SUBSET_KEYS[name].level == DATASET
        ]
        _report_omitted_keys(project, dataset, names, _NOT_PER_SUBSET)
        for name in names:
            dataset.table_keys.pop(name)


def needs_subsets(data: Mapping[str, Any]) -> bool:
    """Return whether any of these dataset.toml keys requires the layout with subsets."""
    return any(name not in KEYS for name in data)


def _report_omitted_keys(
    project: ForeignProject, dataset: ForeignDataset, names: Collection[str], reason: str
) -> None:
    for name in names:
        key = dataset.source_keys.get(name, dataset.folder_key)
        project.remove_from_report(key)
        project.report_omitted_key(key, reason)


def _find_dataset(project: ForeignProject, folder: Path, media_folder: Path) -> ForeignDataset | None:
    """Return the project's dataset with this folder's path, otherwise the only one with the same folder name.

    None if there is no such dataset.
    """
    with_keys = [known for known in project.datasets.values() if known.path is not None and known.table_keys]
    for known in with_keys:
        found = find_beside(project.path, str(known.path))
        if found is not None and real_path(found) == real_path(media_folder):
            return known
    named = [known for known in with_keys if known.path is not None and known.path.name == media_folder.name]
    return named[0] if len(named) == 1 and media_folder != folder else None
