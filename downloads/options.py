"""Options of tools/download.py. Standard library only."""

from pathlib import Path

from downloads.catalogue import ModelSet, families, model_sets
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.options import Options, option

SOURCES = ("huggingface", "modelscope")


class DownloadOptions(Options):
    """Options of a download, or of a list of downloads."""

    family: str | None = option("the kind of model", choices=families(), by_place=True)
    task: str | None = option("which of the family's models, such as t2v-1.3B; --list shows them")
    to: Path = option("folder for the models", default=Path("models"), place="new folder")
    list_only: bool = option(
        "only show the files with sizes and licences; of all families, or of --family and --task", name="list"
    )
    source: str = option(
        "site to download from; what modelscope does not have comes from huggingface. HF_ENDPOINT names a "
        "mirror of huggingface, MODELSCOPE_DOMAIN one of modelscope, GITHUB_ENDPOINT one of GitHub, where "
        "some files of tools are",
        default=SOURCES[0],
        choices=SOURCES,
    )
    fp8_encoders: bool = option(
        "take text encoders in 8 bits: 7 instead of 11 GB for Wan2.1, 9 instead of 16 GB for the others"
    )
    verify: bool = option(
        "also compare the SHA-256 of files that are there; those of downloaded files always are"
    )
    accept_changed: bool = option(
        "take files that the repository has replaced since this program's list was made, by others of "
        "their kind"
    )

    def __post_init__(self) -> None:
        if self.family is None and (self.task is not None or not self.list_only):
            raise OptionError(f"--family is missing: {', '.join(families())}. --list shows what there is.")
        tasks = [model.task for model in model_sets() if model.family == self.family]
        if self.task is not None and self.task not in tasks:
            hint = did_you_mean(self.task, tasks)
            raise OptionError(f"--task {self.task}: {self.family} has {', '.join(tasks)}.{hint}")
        if self.task is None and not self.list_only and len(tasks) > 1:
            raise OptionError(f"--task is missing: {', '.join(tasks)}. --list shows what each needs.")

    def sets(self) -> list[ModelSet]:
        """Return the sets that the options name: one, or with --list also several."""
        return [
            model
            for model in model_sets(self.fp8_encoders)
            if self.family in (None, model.family) and self.task in (None, model.task)
        ]
