"""Options of tools/download.py. Standard library only."""

import argparse
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from downloads.catalogue import ModelSet, families, model_sets
from modules.errors import OptionError

SOURCES = ("huggingface", "modelscope")


@dataclass(frozen=True)
class DownloadOptions:
    """Options of a download, or of a list of what can be downloaded."""

    family: str | None
    task: str | None
    to: Path
    list_only: bool = field(metadata={"option": "list"})
    source: str
    fp8_encoders: bool
    verify: bool
    accept_changed: bool

    def __post_init__(self) -> None:
        if self.family is None and (self.task is not None or not self.list_only):
            raise OptionError(f"--family is missing: {', '.join(families())}. --list shows what there is.")
        tasks = [one.task for one in model_sets() if one.family == self.family]
        if self.task is not None and self.task not in tasks:
            near = difflib.get_close_matches(self.task, tasks, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise OptionError(
                f"--task {self.task}: {self.family} has {', '.join(tasks)}.{hint}",
            )
        if self.task is None and not self.list_only and len(tasks) > 1:
            raise OptionError(f"--task is missing: {', '.join(tasks)}. --list shows what each needs.")
        if self.to.exists() and not self.to.is_dir():
            raise OptionError(f"--to {self.to}: this is a file. Give the folder for the models.")

    def sets(self) -> list[ModelSet]:
        """Return what the options name: one set, or with --list also several."""
        return [
            one
            for one in model_sets(self.fp8_encoders)
            if self.family in (None, one.family) and self.task in (None, one.task)
        ]


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `DownloadOptions`."""
    group = parser.add_argument_group("what to download")
    group.add_argument("--family", choices=families(), help="the kind of model")
    group.add_argument("--task", help="which of the family's models, such as t2v-1.3B; --list shows them")
    group.add_argument(
        "--fp8_encoders",
        action="store_true",
        help="take text encoders in 8 bits: 7 instead of 11 GB for Wan2.1, 9 instead of 16 GB for the others",
    )
    group.add_argument(
        "--list",
        action="store_true",
        help="only show the files with sizes and licences; of all families, or of --family and --task",
    )
    group = parser.add_argument_group("where from and where to")
    group.add_argument("--to", default="models", help="folder for the models (%(default)s)")
    group.add_argument(
        "--source",
        default=SOURCES[0],
        choices=SOURCES,
        help="site to download from (%(default)s); what modelscope does not have comes from huggingface. "
        "HF_ENDPOINT names a mirror of huggingface, MODELSCOPE_DOMAIN one of modelscope, "
        "GITHUB_ENDPOINT one of GitHub, where some files of tools are",
    )
    group = parser.add_argument_group("checks")
    group.add_argument(
        "--verify",
        action="store_true",
        help="also compare the SHA-256 of files that are there; those of downloaded files always are",
    )
    group.add_argument(
        "--accept_changed",
        action="store_true",
        help="take files that the repository has replaced since this program's list was made, by others of "
        "their kind",
    )
