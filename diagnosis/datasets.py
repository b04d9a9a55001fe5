"""Reading a dataset for a diagnosis: its captions, measured media files and the model's tokenizers."""

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.report.diagnosis.contract import MeasuredDataset, list_captions
from data_tools.report.findings import load_token_counters
from data_tools.report.page import ReportOptions
from data_tools.report.run import find_copies, measure_tables, select_latents
from dataset.config import DatasetConfig, load_dataset_config, with_lengths
from dataset.options import CachingOptions
from dataset.scripts import cache_family_texts
from modules.errors import DatasetError
from protocols.families import with_scripts
from protocols.family import Caches
from protocols.rules import CountTokens


def read_dataset(path: Path) -> MeasuredDataset:
    """Measure a dataset without a model: its tokenizers are unknown.

    Raises:
        DatasetError: If the dataset has no readable files.
    """
    return _measure(path, load_dataset_config(path), family=None, counters={})


def read_project_dataset(folder: Path, commands: Sequence[Sequence[str]]) -> MeasuredDataset | None:
    """Measure the dataset of a described folder, with the tokenizers of its model.

    Captions that are shuffled are not encoded ahead; then the tokenizers are unknown.

    Args:
        folder: Working folder of the commands.
        commands: The commands of run.toml.

    Returns:
        The dataset; None if no command reads one.
    """
    families = {f"{entry.cache}_text_encoder_outputs.py": name for name, entry in with_scripts().items()}
    command = next((argv for argv in commands if len(argv) > 1 and argv[1] in families), None)
    if command is None:
        paths = [
            Path(value)
            for argv in commands
            for option, value in itertools.pairwise(argv)
            if option == "--dataset_config"
        ]
        with contextlib.chdir(folder):
            return read_dataset(paths[0]) if paths else None
    measured: list[MeasuredDataset] = []

    # the script that encodes captions loads family and dataset, then calls this function instead of encoding
    def measure_instead(family: Caches, config: DatasetConfig, options: CachingOptions, *_: object) -> None:
        counters = load_token_counters(family.text_encoders)
        assert options.dataset_config is not None
        path = Path(options.dataset_config)
        measured.append(_measure(path, config, family, counters=dict(counters.by_encoder)))

    with contextlib.chdir(folder):
        cache_family_texts(families[command[1]], None, list(command[2:]), measure_instead)
    return measured[0]


def _measure(
    path: Path, config: DatasetConfig, family: Caches | None, counters: Mapping[str, CountTokens]
) -> MeasuredDataset:
    """Measure the media files and collect the captions of a dataset."""
    options = ReportOptions(dataset_config=path, json=path.with_suffix(".json"))
    workers = max(1, (os.cpu_count() or 2) - 1)
    latent = select_latents(options) if family is None else family.latent
    tables = measure_tables(with_lengths(config, latent.lengths), options, latent, workers)
    if not any(findings.sources for findings in tables):
        faults = [fault.text for findings in tables for fault in findings.errors]
        raise DatasetError("\n  ".join([f"{path}: there are no files to diagnose", *faults]))
    return MeasuredDataset(
        path,
        tables=tables,
        copies=find_copies(tables),
        captions=list_captions(tables, counters),
        counters=counters,
    )
