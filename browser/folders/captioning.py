"""Let a model write captions: the command, a trial on a few files, and the captions that it printed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from browser.folders.folder_files import picture_address
from browser.jobs.jobs import Job
from modules.pages.language import refusal, say
from project.options import CAPTION_MODEL, CAPTION_MODEL_SIZE, WRITE_CAPTIONS
from protocols.families import caption_formats

CAPTION_SCRIPT = WRITE_CAPTIONS[1]
TRIED = 3  # number of files in a trial run
TYPED_OPTIONS = ("api_base",)  # options of the command that send data to the address typed in the page's form


@dataclass(frozen=True)
class TriedCaption:
    """A trial caption that a model has generated for a file, and that was not saved."""

    name: str
    address: str | None  # address of its image
    text: str


@dataclass(frozen=True)
class CaptionForm:
    """Fields of the form for captioning images and clips with a model.

    Attributes:
        engine: Repository or folder of a model, or the address of a server and the name of its model.
        question: Prompt for the model; "" for the model's default.
        format: Family whose JSON caption format is written; "" for sentences.
        converts_plain: Whether existing captions that are sentences are converted to JSON, too.
    """

    engine: str = ""
    question: str = ""
    format: str = ""
    converts_plain: bool = False

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> "CaptionForm":
        """Read the form from its fields; a missing field is empty or off."""
        return cls(
            fields.get("engine", ""),
            fields.get("question", ""),
            fields.get("caption_format", ""),
            bool(fields.get("convert_plain")),
        )


def make_caption_argv(form: CaptionForm, try_on: int | None = None) -> list[str]:
    """Return the command line that captions the dataset of a folder with a dataset.toml.

    Args:
        form: The form of the page.
        try_on: Number of files whose captions are printed but not saved; None to save all captions.

    Raises:
        OptionError: If the form names a server without a model, or an unknown format.
    """
    # the command that `new` prints, without its model
    argv = WRITE_CAPTIONS[: WRITE_CAPTIONS.index("--model")]
    argv = [*argv, *_make_engine_options(form.engine.strip() or CAPTION_MODEL)]
    if form.question.strip():
        argv += ["--prompt", " ".join(form.question.split())]
    if form.format:
        if form.format not in caption_formats():
            raise refusal("There is no such caption format.")
        argv += ["--caption_format", form.format]
        argv += ["--convert_plain"] if form.converts_plain else []
    if try_on is not None:
        argv += ["--try_on", str(try_on)]
    return argv


def _make_engine_options(engine: str) -> list[str]:
    """Return the options for a model's name or folder, or for `ADDRESS MODEL` of a server."""
    if not engine.startswith(("http://", "https://")):
        return ["--model", engine]
    address, _, model = engine.partition(" ")
    if not model.strip():
        raise refusal(
            "%(address)s: add the name of the server's model after the address and a space.", address=address
        )
    return ["--api_base", address, "--api_model", model.strip()]


def describe_engine(engine: str) -> str:
    """Return "ready" or the download size of the default caption model; "" for other models."""
    if engine != CAPTION_MODEL:
        return ""
    from huggingface_hub import constants  # imported here because only this page needs it

    folder = Path(constants.HF_HUB_CACHE) / f"models--{CAPTION_MODEL.replace('/', '--')}"
    return (
        say("ready")
        if folder.is_dir()
        else say("%(caption_model_size)s to download", caption_model_size=CAPTION_MODEL_SIZE)
    )


def read_tries(job: Job | None, folder: Path) -> list[TriedCaption]:
    """Return the captions that a trial run has printed, each below the path of its file."""
    if job is None:
        return []
    tries = []
    lines = job.last_lines(200).splitlines()
    for path_line, caption_line in zip(lines, lines[1:], strict=False):
        path = folder / path_line.strip()
        if path_line[:1].isspace() or not caption_line.startswith("  ") or not path.is_file():
            continue
        tries.append(TriedCaption(path.name, picture_address(path), caption_line.strip()))
    return tries
