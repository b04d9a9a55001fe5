"""Options of saving: content, time, name, and the state to continue from."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import require
from modules.options import Options, option
from modules.output_files import check_output_name

SAVE_PRECISIONS = ("float", "fp32", "fp16", "bf16")
RESOLUTION = re.compile(r"\d+\s*([,x]\s*\d+)?")  # of --metadata_reso
LATEST = "latest"  # --resume latest: the newest complete state of this output name, a new run without one
LATEST_ONLY = "latest-or-fail"  # the same, but an error without a state; used in printed commands
AT_THE_END = "omit it to save at the end only"
KEEP_ALL = "omit it to keep all"


def _if_saved(kind: str, with_states: bool = False) -> dict[str, Callable[[Any], bool]]:
    """Return the `acts_if` condition of an option that has an effect only if files are saved by `kind`."""
    needed = f"--save_every_n_{kind}"
    if with_states:
        return {
            f"it needs --save_state and {needed}": lambda options: (
                options.save_state and options.saves_by(kind)
            ),
        }
    return {f"there is no {needed}": lambda options: options.saves_by(kind)}


class SavingOptions(Options, title="saving"):
    """Options of files and state folders.

    `output_dir` and `output_name` are None only in commands that show something and exit.
    """

    output_dir: Path | None = option(
        "folder for trained files, states and samples", place="new folder", often=True
    )
    output_name: str | None = option("first part of the names of these files", often=True)
    overwrite: bool = option(
        "replace earlier results of this name; without it a new training moves them to a folder "
        "OUTPUT_NAME.before-DATE-TIME"
    )
    save_precision: str | None = option(
        "dtype of saved weights; default: the model's dtype", choices=SAVE_PRECISIONS
    )
    save_every_n_epochs: int | None = option(
        "save the model every N epochs", minimum=1, hint=AT_THE_END, often=True
    )
    save_n_epoch_ratio: int | None = option(
        "save N times in the run, spread over its epochs; replaces --save_every_n_epochs",
        minimum=1,
        excludes="save_every_n_epochs",
        hint=AT_THE_END,
    )
    save_every_n_steps: int | None = option(
        "save the model every N steps", minimum=1, hint=AT_THE_END, often=True
    )
    # saved after the step that passes this time, named by the step
    save_every_n_minutes: float | None = option(
        "save after the first step past this time, under the step's name", above=0, hint=AT_THE_END
    )
    save_last_n_epochs: int | None = option(
        "keep the files of the last N epochs only", minimum=1, hint=KEEP_ALL, acts_if=_if_saved("epochs")
    )
    save_last_n_epochs_state: int | None = option(
        "the same for state folders; default: --save_last_n_epochs",
        minimum=1,
        hint=KEEP_ALL,
        acts_if=_if_saved("epochs", with_states=True),
    )
    save_last_n_steps: int | None = option(
        "keep the files of the last N steps only",
        minimum=0,
        hint=f"0 keeps the newest; {KEEP_ALL}",
        acts_if=_if_saved("steps"),
    )
    save_last_n_steps_state: int | None = option(
        "the same for state folders; default: --save_last_n_steps",
        minimum=0,
        hint=f"0 keeps the newest; {KEEP_ALL}",
        acts_if=_if_saved("steps", with_states=True),
    )
    save_state: bool = option("save everything that resuming needs with each file", often=True)
    save_state_on_train_end: bool = option("save the state only at the end")
    # a state folder, LATEST, LATEST_ONLY, or with resume_from_huggingface owner/repo/path[:revision[:type]]
    resume: str | None = option(
        "state folder to continue from; latest: the newest of this --output_name, or a new run if there is "
        "none; latest-or-fail: the newest, or an error",
        often=True,
    )
    resume_changed: bool = option(
        "continue from --resume with another learning rate, other clips or more accumulation: lists "
        "what differs, old -> new; the network and the optimizer must stay the same",
        acts_if={"there is no --resume": lambda options: options.resume is not None},
    )

    def saves_by(self, kind: str) -> bool:
        """Return whether files are saved between the first and the last step.

        Args:
            kind: Epochs or steps.
        """
        epochs = self.save_every_n_epochs, self.save_n_epoch_ratio
        steps = self.save_every_n_steps, self.save_every_n_minutes
        return any(every is not None for every in (epochs if kind == "epochs" else steps))

    @property
    def folder_and_name(self) -> tuple[Path, str]:
        """Return folder and name of saved files.

        Raises:
            OptionError: If one is missing.
        """
        return (
            require(self.output_dir, "--output_dir", "the folder to save into"),
            require(self.output_name, "--output_name", "the name of the file to train, without its ending"),
        )

    @property
    def saves_state_at_end(self) -> bool:
        """Whether the end of the run writes a state folder."""
        return self.save_state or self.save_state_on_train_end

    def with_epochs_between_saves(self, num_epochs: int, ratio: int) -> "SavingOptions":
        """Return options in which --save_every_n_epochs replaces --save_n_epoch_ratio.

        Args:
            num_epochs: Number of epochs of the run.
            ratio: Number of saves over the run.
        """
        every = max(1, num_epochs // ratio)
        return replace(self, save_n_epoch_ratio=None, save_every_n_epochs=every)

    def __post_init__(self) -> None:
        if self.output_name is not None:
            check_output_name("--output_name", self.output_name, is_new=self.resume is None)


class MetadataOptions(Options, title="metadata of saved files"):
    """Metadata that is written into saved files."""

    no_metadata: bool = option("keep only what loading the file needs")
    training_comment: str | None = option(
        "free text", acts_if={"--no_metadata leaves it out": lambda options: not options.no_metadata}
    )
    title: str | None = option("title; default: --output_name", name="metadata_title")
    author: str | None = option("who made the model", name="metadata_author")
    description: str | None = option("what the model is for, in a sentence", name="metadata_description")
    license: str | None = option("license of the model, for example apache-2.0", name="metadata_license")
    tags: str | None = option("words, separated by commas", name="metadata_tags")
    resolution: str | None = option(
        "resolution, such as 832,480, or 1024 for a square; default: of the model", name="metadata_reso"
    )
    architecture: str | None = option(
        "architecture, for models that are detected incorrectly; default: detected", name="metadata_arch"
    )
    usage_hint: str | None = option("how to use the model, in a sentence", name="metadata_usage_hint")
    thumbnail: str | None = option("a thumbnail image, as a data: URL", name="metadata_thumbnail")
    merged_from: str | None = option(
        "the models it was merged from, separated by commas", name="metadata_merged_from"
    )
    trigger_phrase: str | None = option(
        "words that trigger the trained subject or style in a prompt", name="metadata_trigger_phrase"
    )
    preprocessor: str | None = option("preprocessing that inputs need", name="metadata_preprocessor")
    is_negative_embedding: str | None = option(
        "true if it is meant for the negative prompt", name="metadata_is_negative_embedding"
    )

    def __post_init__(self) -> None:
        if self.resolution is not None and not RESOLUTION.fullmatch(self.resolution.strip()):
            raise OptionError(
                f"--metadata_reso {self.resolution}: use width and height, such as 832,480, or one number "
                "for a square"
            )
