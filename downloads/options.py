"""Options of tools/download.py. Standard library only."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from downloads.catalogue import ModelSet, families, model_sets
from downloads.naming import NamedModel, is_task_spelling, read_family, reject_fine_tune
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.options import Options, option

SOURCES = ("huggingface", "modelscope")


class DownloadOptions(Options, must_give=True):
    """Options of a download, or of a list of downloads."""

    family: str | None = option(
        f"the kind of model: {', '.join(families())}; also with its task, as krea2-turbo", by_place=True
    )
    task: str | None = option("which of the family's models, such as t2v-1.3B; --list shows them")
    to: Path = option("folder for the models", default=Path("models"), place="new folder")
    list_only: bool = option(
        "only show the files with sizes and licenses; of all families, or of --family and --task", name="list"
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
    without: tuple[str, ...] = option(
        "files that are not downloaded, by the options that take them, such as dit vae: you have others",
        default=(),
        nargs="+",
        metavar="NAME",
    )
    accept_changed: bool = option(
        "take files that the repository has replaced since this program's list was made, by others of "
        "their kind"
    )

    def __post_init__(self) -> None:
        if self.family is None and (self.task is not None or not self.list_only):
            raise OptionError(f"--family is missing: {', '.join(families())}. --list shows what there is.")
        named = self.named
        tasks = [model.task for model in model_sets() if named is not None and model.family == named.family]
        if self.task is not None and self._task is None:
            hint = did_you_mean(self.task, tasks)
            raise OptionError(f"--task {self.task}: {self.family} has {', '.join(tasks)}.{hint}")
        if self._task is None and not self.list_only and len(tasks) > 1:
            raise OptionError(f"--task is missing: {', '.join(tasks)}. --list shows what each needs.")
        if named is not None and named.task not in (None, self._task):
            raise OptionError(
                f"--family {self.family} names {named.task}, --task is {self.task}. Omit one of them"
            )

    @property
    def named(self) -> NamedModel | None:
        """Return the model that --family names.

        Raises:
            OptionError: If no such model can be downloaded.
        """
        if self.family is None:
            return None
        named = read_family(self.family, model_sets())
        reject_fine_tune(named, self.family, model_sets())
        return named

    @property
    def _task(self) -> str | None:
        """Return the task set by the options, in the catalogue's spelling; None if it is not set."""
        named = self.named
        if named is None or self.task is None:
            return None if named is None else named.task
        family_tasks = (model.task for model in model_sets() if model.family == named.family)
        return next((task for task in family_tasks if is_task_spelling(self.task, task)), None)

    def sets(self) -> list[ModelSet]:
        """Return the model sets that --family and --task select, without the files of --without.

        Raises:
            OptionError: If --without names something that is not a file of the set.
        """
        family = None if self.named is None else self.named.family
        return [
            leave_out(model, self.without)
            for model in model_sets(self.fp8_encoders)
            if family in (None, model.family) and self._task in (None, model.task)
        ]


def leave_out(model: ModelSet, names: Sequence[str]) -> ModelSet:
    """Return a model without the files of some options.

    Raises:
        OptionError: If the model has no file for one of the options.
    """
    options = [part.option.lstrip("-") for part in model.components if part.option]
    flags = []
    for name in names:
        bare_name = name.lstrip("-")
        if bare_name not in options:
            raise OptionError(
                f"--without {name}: {model.family} {model.task} has {', '.join(options)}."
                f"{did_you_mean(bare_name, options)}"
            )
        flags.append(f"--{bare_name}")
    return replace(model, components=tuple(part for part in model.components if part.option not in flags))
