"""Options of what is saved, when, under which name, and what a run continues from."""

import argparse
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from modules.errors import OptionError
from modules.options import SECRET, check_at_least, require
from modules.output_files import check_output_name

SAVE_PRECISIONS = ("float", "fp32", "fp16", "bf16")
RESOLUTION = re.compile(r"\d+\s*([,x]\s*\d+)?")  # of --metadata_reso
LATEST = "latest"  # --resume latest: the newest complete state of this output name, a new run without one
LATEST_ONLY = "latest-or-fail"  # the same, an error without one: what commands that are printed say


@dataclass(frozen=True)
class SavingOptions:
    """Options of files and state folders.

    `output_dir` and `output_name` are None only if the run just shows something and exits.
    """

    output_dir: Path | None
    output_name: str | None
    overwrite: bool  # replace earlier results of that name instead of setting them aside
    save_precision: str | None  # None: the model's dtype
    save_every_n_epochs: int | None
    save_n_epoch_ratio: int | None  # saves in the whole run, spread over its epochs
    save_every_n_steps: int | None
    save_every_n_minutes: float | None  # saved after the step that passes this time, named by the step
    save_last_n_epochs: int | None  # None: keep all
    save_last_n_epochs_state: int | None
    save_last_n_steps: int | None
    save_last_n_steps_state: int | None
    save_state: bool
    save_state_on_train_end: bool
    # a state folder, LATEST, LATEST_ONLY, or with resume_from_huggingface owner/repo/path[:revision[:type]]
    resume: str | None
    resume_changed: bool  # go on although settings or clips differ

    @property
    def place(self) -> tuple[Path, str]:
        """Return folder and name of what is saved. Raises OptionError if one is missing."""
        return (
            require(self.output_dir, "--output_dir", "the folder to save into"),
            require(self.output_name, "--output_name", "the name of the file to train, without its ending"),
        )

    @property
    def result(self) -> Path:
        """Return the file that a finished run leaves."""
        return (self.output_dir or Path()) / f"{self.output_name}.safetensors"

    def spread(self, num_epochs: int) -> "SavingOptions":
        """Return the options with --save_n_epoch_ratio as --save_every_n_epochs. num_epochs: of the run."""
        if self.save_n_epoch_ratio is None:
            return self
        every = max(1, num_epochs // self.save_n_epoch_ratio)
        return replace(self, save_n_epoch_ratio=None, save_every_n_epochs=every)

    def __post_init__(self) -> None:
        for name in ("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"):
            check_at_least(f"--{name}", getattr(self, name), 1, "leave it out to save at the end only")
        if self.save_n_epoch_ratio is not None and self.save_every_n_epochs is not None:
            raise OptionError(
                "--save_n_epoch_ratio and --save_every_n_epochs both say after which epochs to save: give one"
            )
        if self.save_every_n_minutes is not None and not self.save_every_n_minutes > 0:
            raise OptionError(
                f"--save_every_n_minutes {self.save_every_n_minutes:g}: give a number above 0, or leave it "
                "out"
            )
        for name in ("save_last_n_epochs", "save_last_n_epochs_state"):
            check_at_least(f"--{name}", getattr(self, name), 1, "leave it out to keep all")
        for name in ("save_last_n_steps", "save_last_n_steps_state"):
            check_at_least(
                f"--{name}", getattr(self, name), 0, "0 keeps the newest; leave it out to keep all"
            )
        if self.output_dir is not None and self.output_dir.is_file():
            raise OptionError(f"--output_dir {self.output_dir}: is a file; give a folder, it will be created")
        if self.output_name is not None:
            check_output_name("--output_name", self.output_name)


@dataclass(frozen=True)
class HubOptions:
    """Options of upload to and resume from the Hugging Face hub."""

    huggingface_repo_id: str | None  # None: no upload
    huggingface_repo_type: str | None  # None: model
    huggingface_path_in_repo: str | None
    huggingface_token: str | None = field(metadata=SECRET)
    huggingface_repo_visibility: str | None  # private unless "public"
    save_state_to_huggingface: bool
    resume_from_huggingface: bool
    async_upload: bool

    def __post_init__(self) -> None:
        if self.huggingface_repo_type not in {None, "model", "dataset", "space"}:
            raise OptionError(
                f"--huggingface_repo_type {self.huggingface_repo_type}: use model, dataset or space"
            )
        if self.huggingface_repo_visibility not in {None, "public", "private"}:
            raise OptionError(
                f"--huggingface_repo_visibility {self.huggingface_repo_visibility}: use public or private"
            )
        if self.huggingface_repo_id is None and (self.save_state_to_huggingface or self.async_upload):
            raise OptionError(
                "--save_state_to_huggingface and --async_upload need --huggingface_repo_id: where to upload, "
                "as owner/name"
            )


@dataclass(frozen=True)
class MetadataOptions:
    """Options of the metadata of saved files."""

    no_metadata: bool
    training_comment: str | None
    title: str | None = field(metadata={"option": "metadata_title"})
    author: str | None = field(metadata={"option": "metadata_author"})
    description: str | None = field(metadata={"option": "metadata_description"})
    license: str | None = field(metadata={"option": "metadata_license"})
    tags: str | None = field(metadata={"option": "metadata_tags"})
    resolution: str | None = field(metadata={"option": "metadata_reso"})
    architecture: str | None = field(metadata={"option": "metadata_arch"})
    usage_hint: str | None = field(metadata={"option": "metadata_usage_hint"})
    thumbnail: str | None = field(metadata={"option": "metadata_thumbnail"})  # a data: URL
    merged_from: str | None = field(metadata={"option": "metadata_merged_from"})
    trigger_phrase: str | None = field(metadata={"option": "metadata_trigger_phrase"})
    preprocessor: str | None = field(metadata={"option": "metadata_preprocessor"})
    is_negative_embedding: str | None = field(metadata={"option": "metadata_is_negative_embedding"})

    def __post_init__(self) -> None:
        if self.resolution is not None and not RESOLUTION.fullmatch(self.resolution.strip()):
            raise OptionError(
                f"--metadata_reso {self.resolution}: give width and height, such as 832,480, or one number "
                "for a square"
            )


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `SavingOptions`."""
    group = parser.add_argument_group("saving")
    group.add_argument("--output_dir", help="folder for trained files, states and samples")
    group.add_argument("--output_name", help="start of their names")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace earlier results of this name; without it a new training moves them to a folder "
        "OUTPUT_NAME.before-DATE-TIME",
    )
    group.add_argument(
        "--save_precision",
        choices=SAVE_PRECISIONS,
        help="dtype of saved weights; the model's dtype when not given",
    )
    group.add_argument("--save_every_n_epochs", type=int, help="save the model after every so many epochs")
    group.add_argument(
        "--save_n_epoch_ratio",
        type=int,
        metavar="N",
        help="save N times in the run, spread over its epochs; replaces --save_every_n_epochs",
    )
    group.add_argument("--save_every_n_steps", type=int, help="save the model after every so many steps")
    group.add_argument(
        "--save_every_n_minutes",
        type=float,
        help="save after the first step past this time, under the step's name",
    )
    group.add_argument("--save_last_n_epochs", type=int, help="keep the files of the last N epochs only")
    group.add_argument(
        "--save_last_n_epochs_state",
        type=int,
        help="the same for state folders; --save_last_n_epochs when not given",
    )
    group.add_argument("--save_last_n_steps", type=int, help="keep the files of the last N steps only")
    group.add_argument(
        "--save_last_n_steps_state",
        type=int,
        help="the same for state folders; --save_last_n_steps when not given",
    )
    group.add_argument(
        "--save_state", action="store_true", help="save everything that resuming needs with each file"
    )
    group.add_argument("--save_state_on_train_end", action="store_true", help="save it at the end only")
    group.add_argument(
        "--resume",
        help="state folder to continue from; latest: the newest of this --output_name, or a new run if there "
        "is none; latest-or-fail: the newest, or an error",
    )
    group.add_argument(
        "--resume_changed",
        action="store_true",
        help="go on from --resume with another learning rate, other clips or more accumulation: lists what "
        "differs, old -> new; the network and the optimizer have to stay",
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `HubOptions`."""
    group = parser.add_argument_group("Hugging Face hub")
    group.add_argument(
        "--huggingface_repo_id",
        help="upload each saved file to this repository (owner/name); it gets a model card if it has none",
    )
    group.add_argument("--huggingface_repo_type", help="model (when not given), dataset or space")
    group.add_argument("--huggingface_path_in_repo", help="folder in the repository")
    group.add_argument(
        "--huggingface_token", help="access token; the one stored on this machine when not given"
    )
    group.add_argument("--huggingface_repo_visibility", help="public, else a new repository is private")
    group.add_argument(
        "--save_state_to_huggingface", action="store_true", help="upload state folders as well"
    )
    group.add_argument(
        "--resume_from_huggingface",
        action="store_true",
        help="--resume names owner/repo/path[:revision[:type]]",
    )
    group.add_argument(
        "--async_upload",
        action="store_true",
        help="upload while training continues; only the final upload is waited for",
    )


def add_metadata_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `MetadataOptions`."""
    group = parser.add_argument_group("metadata of saved files")
    group.add_argument("--no_metadata", action="store_true", help="keep only what loading the file needs")
    group.add_argument("--training_comment", help="free text")
    group.add_argument("--metadata_title", help="title; --output_name when not given")
    group.add_argument("--metadata_author", help="who made the model")
    group.add_argument("--metadata_description", help="what the model is for, in a sentence")
    group.add_argument("--metadata_license", help="licence of the model, for example apache-2.0")
    group.add_argument("--metadata_tags", help="words, separated by commas")
    group.add_argument(
        "--metadata_reso", help="resolution, such as 832,480, or 1024 for a square; default: 1280,720"
    )
    group.add_argument(
        "--metadata_arch", help="architecture, for models that are not what they look like; default: found"
    )
    group.add_argument("--metadata_usage_hint", help="how to use the model, in a sentence")
    group.add_argument("--metadata_thumbnail", help="a small picture of it, as a data: URL")
    group.add_argument("--metadata_merged_from", help="what it was merged from, separated by commas")
    group.add_argument("--metadata_trigger_phrase", help="words of a prompt that call what was learned")
    group.add_argument("--metadata_preprocessor", help="what inputs have to go through before")
    group.add_argument(
        "--metadata_is_negative_embedding", help="true if it is to be used in the negative prompt"
    )
