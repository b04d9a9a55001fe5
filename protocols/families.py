"""The list of families by name: where each is, and what its names.py declares.

No family is imported before it is needed: a script that only prints its help imports only its own.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modules.command import command_line, quote_command
from modules.errors import CheckpointError
from modules.installation import EXTENSIONS, import_own
from modules.option_values import Placeholder, option_argv
from modules.options import Options
from modules.script_options import parse_options

if TYPE_CHECKING:  # few processes ask for captions
    from protocols.caption_formats import CaptionFormat

logger = logging.getLogger(__name__)

Marks = Sequence[tuple[str, str]]  # a tensor that only such a file has -> what the file is

LOW_NOISE, HIGH_NOISE = "low_noise", "high_noise"  # names of the two experts that Wan2.2 has
CLIPS, IMAGES = "it encodes the clips", "it encodes the images"


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class FamilyEntry:
    """The folder, scripts and option records of a family."""

    room: str  # its folder; each options.py has the same names of functions and records
    own_files: bool = True  # whether it has a files.py with `identify`, not another family's
    script: str = ""  # prefix of its scripts' names
    cache: str = ""  # prefix of its caching scripts' names
    trained: str = "dit"  # field of its option records that names the file of the trained weights
    trainer: str = ""  # its training script; "": `{script}_train_network`
    makes: str = "image"  # end of its generation script's name
    record: str = ""  # prefix of its option records' names
    # files that encode latents: name of the value, spelling of the option, purpose
    encoders: tuple[tuple[str, str, str], ...] = (("vae", "--vae", CLIPS),)
    # options for text encoder files, each followed by a placeholder for its path, for suggested commands; if
    # they depend on the release, `text_encoder_options` in options.py returns them instead
    texts: str = ""
    training: tuple[str, ...] = ()  # the same for its training script
    # shared generation options that it spells differently: name, flag ("": it has no such option)
    spelled: tuple[tuple[str, str], ...] = ()
    # other models that its scripts run, by their names in outputs and LoRA files
    further_models: tuple[str, ...] = ()
    own_latents: tuple[str, ...] = ()  # those of `further_models` with a different latent space
    same_latents: str = ""  # family with the same autoencoder; "": none
    notice: str = ""  # license terms that exclude many users, logged by its scripts at the start
    captions: str = ""  # module in its folder with the `FORMAT` of its captions, if they are JSON objects
    # --- derived
    training_script: str = field(init=False)  # script that trains a LoRA, without `.py`
    generation_script: str = field(init=False)  # script that generates an image or a video, without `.py`
    # flags of shared generation options that the generation script spells differently, by name
    spellings: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        image_spellings = {"video_size": "--image_size"} if self.makes == "image" else {}
        derived = {
            "training_script": self.trainer or f"{self.script}_train_network",
            "generation_script": f"{self.script}_generate_{self.makes}",
            "spellings": {**image_spellings, **dict(self.spelled)},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def log_notice(self) -> None:
        """Log the family's notice as a warning."""
        logger.warning("%s", self.notice)

    @property
    def main_scripts(self) -> tuple[str, ...]:
        """Return the main scripts; the model catalogue names at least one of them for each model."""
        names = (f"{self.cache}_latents", self.training_script, self.generation_script)
        return tuple(f"{name}.py" for name in names)

    @property
    def options(self) -> ModuleType:
        """The family's module of option records; it is imported on first use."""
        return import_own(f"{self.room}.options")

    @property
    def caption_format(self) -> "CaptionFormat | None":
        """Return the JSON format of the model's training captions; None if its captions are sentences."""
        return import_own(f"{self.room}.{self.captions}").FORMAT if self.captions else None

    def options_record(self, kind: str) -> Any:
        """Return an option record of the family.

        Args:
            kind: LatentCaching, TextCaching, Training or Generation.
        """
        return getattr(self.options, f"{self.record}{kind}Options")

    def text_encoder_options(self, family_options: Any) -> dict[str, Any]:
        """Return the options for the text encoders' files; each path is a placeholder.

        Args:
            family_options: Options of the command that caches latents.
        """
        by_release = vars(self.options).get("text_encoder_options")
        if by_release is not None:
            return dict(by_release(family_options))
        flags = self.texts.split()[::2]
        words = self.texts.split()[1::2]
        return {flag: Placeholder(word) for flag, word in zip(flags, words, strict=True)}

    def training_options(self, family_options: Any, family: Any) -> dict[str, Any]:
        """Return the training options that these latent caches require, by flag.

        Args:
            family_options: Options of the command that cached the latents.
            family: Family that this command built.
        """
        by_caches = vars(self.options).get("training_options")
        return {} if by_caches is None else dict(by_caches(family_options, family))

    def caching_commands(
        self,
        family_options: Any,
        dataset_config: Path | None,
        switches: Sequence[str],
        typed: Mapping[str, str] | None = None,
        condition_set: str = "",
    ) -> tuple[str, str]:
        """Return the commands that cache the missing latents and text encoder outputs of a training run.

        Args:
            family_options: Options of the training run.
            dataset_config: Dataset file of the training run.
            switches: Additional options for the command that caches latents.
            typed: Public name of an option -> the user's spelling of it.
            condition_set: Conditions that only a teacher gets (`Batch.condition_set`); "" for none.
        """
        from modules.repeated_options import join_options, repeat_given  # not for --help

        # options that the training and a caching command have in common keep the user's values
        repeated = repeat_given(family_options, typed)
        latent_options, text_options = self.options.caching_options(family_options)
        for_teacher = vars(self.options).get("teacher_caching_options")
        if condition_set and for_teacher is not None:
            teacher_latents, teacher_texts = for_teacher(condition_set)
            latent_options = {**latent_options, **teacher_latents}
            text_options = {**text_options, **teacher_texts}

        def build_command(script: str, record: str, needed: Mapping[str, Any]) -> list[str]:
            options = join_options(self.options_record(record), needed, repeated)
            argv = option_argv({"--dataset_config": str(dataset_config), **options})
            return ["python", f"{self.cache}_{script}.py", *argv]

        cache_latents = build_command("latents", "LatentCaching", latent_options)
        cache_texts = build_command("text_encoder_outputs", "TextCaching", text_options)
        return quote_command([*cache_latents, *switches]), quote_command(cache_texts)

    def generation_argv(
        self, family_options: Any, sample: Mapping[str, Any], typed: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the command line that generates a sample with the models of a training run.

        Options of the training run are repeated if the generation script has them too.

        Args:
            family_options: Options of the training run.
            sample: Settings of a sample, by the field names of `Request`; may be empty.
            typed: Public name of an option -> the user's spelling of it.
        """
        from modules.repeated_options import join_options, repeat_given  # not for --help

        chosen = self.options.generation_options(family_options, sample)
        joined = join_options(self.options_record("Generation"), chosen, repeat_given(family_options, typed))
        return [f"{self.generation_script}.py", *option_argv(joined)]

    def make_family(self, kind: str, family_options: Any) -> Any:
        """Build the family for one kind of run from its options; this imports torch.

        Args:
            kind: `training`, `caching` or `generation`.
            family_options: The family's options for this kind of run.
        """
        return getattr(import_own(f"{self.room}.family"), f"family_for_{kind}")(family_options)


# family -> its folder, whose names.py has `ENTRY`, `LORA` and `MARKS`. The order matters: if families have
# equal names of LoRA modules, or equal `SHARED_MARKS`, the first one is chosen
FOLDERS: Mapping[str, str] = {
    "wan": "wan",
    "hunyuan_video": "hunyuan_model",
    "framepack": "frame_pack",
    "ltx_2": "ltx_2",
    "flux": "flux",
    "flux_kontext": "flux.kontext",
    "flux_2": "flux_2",
    "flux_3": "flux_3",
    "hunyuan_video_1_5": "hunyuan_video_15",  # before HunyuanImage, some of whose tensors it has too
    "hunyuan_image": "hunyuan_image",
    "lumina": "lumina",
    "qwen_image": "qwen_image",
    "z_image": "z_image",
    "krea2": "krea2",
    "minimax_h3": "minimax_h3",
    "qwen_image_21": "qwen_image_21",
    "moss_image": "moss_image",
    "fibo_2": "fibo_2",
    "ernie_image": "ernie_image",
    "ideogram4": "ideogram4",
    "kandinsky": "kandinsky",
    "hidream_o1": "hidream_o1",
    "anima": "anima",
    "stable_diffusion": "stable_diffusion",
    "sd1": "stable_diffusion.sd1",
    "sdxl": "stable_diffusion.sdxl",
}
if os.environ.get(EXTENSIONS):
    from modules.extensions import FAMILIES as GROUP
    from modules.extensions import find_values

    FOLDERS = {**FOLDERS, **find_values(GROUP)}


class Families(Mapping[str, FamilyEntry]):
    """The entries of all families by name; each is read on first use."""

    def __getitem__(self, name: str) -> FamilyEntry:
        entry: FamilyEntry = import_own(f"{FOLDERS[name]}.names").ENTRY
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(FOLDERS)

    def __len__(self) -> int:
        return len(FOLDERS)


FAMILIES = Families()


@cache
def with_scripts() -> Mapping[str, FamilyEntry]:
    """Return the families that have scripts, which all run the shared loops."""
    return {name: entry for name, entry in FAMILIES.items() if entry.script}


@cache
def caption_formats() -> Mapping[str, "CaptionFormat"]:
    """Return the JSON formats of captions, by name of the family that was trained with each."""
    return {name: entry.caption_format for name, entry in FAMILIES.items() if entry.caption_format}


def list_same_latents(name: str) -> frozenset[str]:
    """Return the names of all models that share a model's latent space, including the model itself.

    Args:
        name: Name of the model in the metadata of outputs.
    """
    spaces: dict[str, str] = {}  # model -> the family whose latent space it has
    for family, entry in FAMILIES.items():
        for model in (family, *entry.further_models):
            is_apart = model in entry.own_latents
            spaces[model] = model if is_apart else entry.same_latents or family
    if name not in spaces:
        return frozenset({name})
    return frozenset(model for model, space in spaces.items() if space == spaces[name])


@cache
def family_marks() -> Marks:
    """Return the tensors that identify families: those unique to a family first, then shared ones."""
    read = [import_own(f"{folder}.names") for folder in FOLDERS.values()]
    marks = (mark for names in read for mark in names.MARKS)
    return (*marks, *(mark for names in read for mark in vars(names).get("SHARED_MARKS", ())))


def identify(path: Path, family: str | None = None) -> str | None:
    """Return one line that describes what a checkpoint or LoRA file contains, as a hint below an error.

    Args:
        path: The file.
        family: Family of the script that was given the file; its models are named first.

    Returns:
        None if no family recognizes the file. For a missing file, a hint on how to download it.
    """
    if not path.exists():
        from downloads.catalogue import download_hint  # only for hints

        return download_hint(path, () if family is None else FAMILIES[family].main_scripts)
    # opened once here, because rejecting a malicious file would take each family a second
    if path.is_file() and path.suffix != ".json" and not _can_be_opened(path):
        return None
    # in reverse, so that Wan comes last: its hints also cover files that belong to no family
    for name in reversed(list(FAMILIES)):
        entry = FAMILIES[name]
        if not entry.own_files:
            continue
        hint: str | None = import_own(f"{entry.room}.files").identify(path)
        if hint is None:
            continue
        # a hint with this beginning names a model that the family's scripts accept
        if entry.script and hint.startswith("it is "):
            return f"{hint}. {describe_scripts(name)}"
        return hint
    return None


def _can_be_opened(path: Path) -> bool:
    """Return whether a checkpoint file is neither damaged nor malicious."""
    from checkpoints.opening import open_file  # only for hints

    try:
        open_file(path).close()
    except CheckpointError:
        return False
    return True


def describe_scripts(family: str) -> str:
    """Return a sentence that names a family's scripts, and the options with which `new` finds its models."""
    entry = FAMILIES[family]
    training_script = f"{entry.training_script}.py"
    scripts = f"Its scripts are {training_script} and {entry.generation_script}.py"
    # The options with which `new` finds the models of a training script, for each of their names
    from downloads.catalogue import model_sets  # only for hints

    trainable = [
        model for model in model_sets() if "train" in model.commands and not model.properties.get("control")
    ]
    # the catalogue may list the models of a script under several family names
    tasks_by_name: dict[str, list[str]] = {}
    for model in trainable:
        if training_script in model.commands["train"].split():
            tasks_by_name.setdefault(model.family, []).append(model.task)
    options_for_new = []
    for name, tasks in tasks_by_name.items():
        option = f"--family {name}"
        # other scripts may train other tasks of the same name
        is_ambiguous = any(model.family == name and model.task not in tasks for model in trainable)
        if is_ambiguous:
            option += f" --task {tasks[0]}"
        options_for_new.append(option)
    if not options_for_new:
        return scripts
    return f"{scripts}; for `new` {' or '.join(options_for_new)}"


class Script(partial[None]):
    """The main function of a script, made by `plain_script`, `caching_script` and the like.

    Its argument is the list of arguments (argv without the script's name); None reads the command line.
    """

    family: str | None = None  # family whose models it runs; None: it belongs to no family

    @classmethod
    def for_family(cls, family: str, main: Callable[..., None]) -> "Script":
        """Make a script that runs the models of `family`."""
        script = cls(main)
        script.family = family
        return script

    def run(self) -> None:
        """Run the script with these command-line arguments; a `UserError` ends it without a traceback."""
        command_line(self, explain=partial(identify, family=self.family))


def plain_script(
    about: str | None,
    work: Callable[..., None] | str,
    *records: type[Options],
    without: Collection[str] = (),
    prepare: Callable[[Any], tuple[Any, ...]] = lambda options: (options,),
    advice_after_interrupt: Callable[[Any], str] = lambda options: "",
) -> Script:
    """Return the main function of a script that reads options and calls a function with the first record.

    Args:
        about: Docstring of the script.
        work: Function to run, or its name, such as `networks.merging.merge_flux`, if importing it loads
            torch.
        records: Option records to read.
        without: Public names of options to omit; their records keep the default.
        prepare: Makes the function's arguments from the first record.
        advice_after_interrupt: Returns the advice to print after Ctrl-C.
    """

    def run_tool(argv: Sequence[str] | None = None) -> None:
        first_record, *_ = parse_options(about, argv, *records, without=without)
        arguments = prepare(first_record)
        try:
            _find_function(work)(*arguments)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"{stop} {advice_after_interrupt(first_record)}".strip()) from None

    return Script(run_tool)


def _find_function(work: Callable[..., None] | str) -> Callable[..., None]:
    if not isinstance(work, str):
        return work
    module, _, name = work.rpartition(".")
    function: Callable[..., None] = getattr(import_own(module), name)
    return function
