"""The list of families by name: where each lies, how its scripts are called, and how to identify its files.

No family is imported before it is asked for: a script that only prints its help reads its own alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from modules.command import as_typed, command_line
from modules.errors import CheckpointError
from modules.installation import import_own
from modules.option_values import option_words
from modules.options import Options, option_values
from modules.parser import parse_options

CLIPS, PICTURES = "it encodes the clips", "it encodes the pictures"


@dataclass(frozen=True)
class FamilyEntry:
    """Name the folder, scripts and option records of a family."""

    room: str  # its folder; functions and records of its options.py have the same names in each
    files: str = "files"  # the module in it with `identify`; "": its files are another family's
    script: str = ""  # what the names of its scripts begin with
    cache: str = ""  # likewise, of its caching scripts
    makes: str = "image"  # end of its generation script's name
    record: str = ""  # what the names of its option records begin with
    # files that encode latents: name of the value, how the option is typed, what for
    encoders: tuple[tuple[str, str, str], ...] = (("vae", "--vae", CLIPS),)
    texts: str = ""  # options of the files that encode texts, in a command that is shown
    training: tuple[str, ...] = ()  # likewise, of its training script
    repeated: tuple[str, ...] = ()  # its options that the next command is given too: "model_version"
    others: tuple[str, ...] = ()  # further models that its scripts run, as LoRA files name them

    @property
    def generation_script(self) -> str:
        """Return the module of its generation script."""
        return f"{self.script}_generate_{self.makes}"

    @property
    def options(self) -> ModuleType:
        """Return its options.py, imported."""
        return import_own(f"{self.room}.options")

    def options_record(self, kind: str) -> Any:
        """Return an option record of the family; kind: LatentCaching, TextCaching, Training, Generation."""
        return getattr(self.options, f"{self.record}{kind}Options")

    def repeat_options(self, own: Any) -> list[str]:
        """Return the words of the options that the next command needs too. own: of the family."""
        values = option_values(own)
        return option_words({f"--{name}": values[name] for name in self.repeated})

    def caching_commands(
        self, own: Any, dataset_config: Path | None, switches: Sequence[str]
    ) -> tuple[str, str]:
        """Return the commands that make missing caches of latents and of texts, for a training.

        own: the training's options of the family. switches: further ones of the command for latents.
        """
        latents, texts = (
            option_words({"--dataset_config": str(dataset_config), **values})
            for values in self.options.caching_options(own)
        )
        return (
            as_typed(["python", f"{self.cache}_latents.py", *latents, *switches]),
            as_typed(["python", f"{self.cache}_text_encoder_outputs.py", *texts]),
        )

    def generation_words(self, own: Any, sample: Mapping[str, Any]) -> list[str]:
        """Return the script and the options that generate with the models of a training.

        own: as of `caching_commands`. sample: settings of a sample, by the names of `Request`; may be empty.
        """
        return [f"{self.generation_script}.py", *option_words(self.options.generation_options(own, sample))]

    def make_family(self, kind: str, own: Any) -> Any:
        """Return the family for the loops, from its options. kind: latent_caching, training, ..."""
        return getattr(import_own(f"{self.room}.family"), f"family_for_{kind}")(own)


# Wan's is last: it also recognises files of no family
FAMILIES = {
    "stable_diffusion": FamilyEntry("stable_diffusion", files="kinds"),
    "lumina": FamilyEntry(
        "lumina",
        script="lumina",
        cache="lumina_cache",
        record="Lumina",
        encoders=(("vae", "--ae", PICTURES),),
        texts="--gemma2 GEMMA2",
    ),
    "flux": FamilyEntry(
        "flux",
        script="flux",
        cache="flux_cache",
        record="Flux",
        encoders=(("vae", "--ae", PICTURES),),
        texts="--t5xxl T5_FILE --clip_l CLIP_FILE",
        others=("chroma",),
    ),
    "flux_kontext": FamilyEntry(
        "flux.kontext",
        files="",
        script="flux_kontext",
        cache="flux_kontext_cache",
        record="Kontext",
        encoders=(("vae", "--vae", PICTURES),),
        texts="--text_encoder1 T5_FILE --text_encoder2 CLIP_FILE",
    ),
    "flux_2": FamilyEntry(
        "flux_2",
        script="flux_2",
        cache="flux_2_cache",
        record="Flux2",
        encoders=(("vae", "--vae", PICTURES),),
        texts="--text_encoder TEXT_ENCODER",
        repeated=("model_version",),
    ),
    "framepack": FamilyEntry(
        "frame_pack",
        script="fpack",
        cache="fpack_cache",
        makes="video",
        record="FramePack",
        encoders=(("vae", "--vae", CLIPS), ("image_encoder", "--image_encoder", "it encodes first frames")),
        texts="--text_encoder1 TEXT_ENCODER1 --text_encoder2 TEXT_ENCODER2",
    ),
    "hunyuan_image": FamilyEntry(
        "hunyuan_image",
        script="hunyuan_image",
        cache="hunyuan_image_cache",
        record="HunyuanImage",
        encoders=(("vae", "--vae", PICTURES),),
        texts="--text_encoder QWEN_FILE --byt5 BYT5_FILE",
        training=("--network_train_unet_only",),
    ),
    "qwen_image": FamilyEntry(
        "qwen_image",
        script="qwen_image",
        cache="qwen_image_cache",
        record="QwenImage",
        encoders=(("vae", "--vae", PICTURES),),
        texts="--text_encoder QWEN_FILE",
        repeated=("model_version", "edit", "edit_plus"),
    ),
    "z_image": FamilyEntry(
        "z_image",
        files="checkpoints",
        script="zimage",
        cache="zimage_cache",
        record="ZImage",
        encoders=(("vae", "--vae", PICTURES),),
        texts="--text_encoder QWEN3_FILE",
    ),
    "krea2": FamilyEntry(
        "krea2",
        script="krea2",
        cache="krea2_cache",
        record="Krea2",
        encoders=(("vae", "--vae", PICTURES),),
        texts="--text_encoder QWEN3_VL_FILE",
    ),
    "hunyuan_video": FamilyEntry(
        "hunyuan_model",
        files="checkpoints",
        script="hv",
        cache="cache",
        makes="video",
        record="Hunyuan",
        texts="--text_encoder1 TEXT_ENCODER1 --text_encoder2 TEXT_ENCODER2",
    ),
    "ltx_2": FamilyEntry(
        "ltx_2",
        files="checkpoints",
        script="ltx2",
        cache="ltx2_cache",
        makes="video",
        record="Ltx2",
        encoders=(("ltx2_checkpoint", "--ltx2_checkpoint", CLIPS),),
        texts="--gemma_root GEMMA_FOLDER",
        repeated=("ltx2_checkpoint", "ltx_mode"),
        others=("ltx2_v1",),
    ),
    "wan": FamilyEntry(
        "wan",
        files="checkpoints",
        script="wan",
        cache="wan_cache",
        makes="video",
        record="Wan",
        texts="--t5 T5",
    ),
}
# those with scripts of their own for caching, training and generation; gen_img.py has files of its own
WITH_SCRIPTS = {name: entry for name, entry in FAMILIES.items() if entry.script}


def identify(path: Path) -> str | None:
    """Return one line about what a checkpoint or LoRA file really is, for a hint below an error.

    Returns None if no family knows the file, and for a missing file how to download it.
    """
    if not path.exists():
        hint: str | None = import_own("downloads.catalogue").download_hint(path)
        return hint
    if path.is_file() and path.suffix != ".json":  # once: a hostile file takes each family a second
        try:
            import_own("modules.checkpoints.containers").open_file(path).close()
        except CheckpointError:
            return None
    for entry in filter(lambda one: one.files, FAMILIES.values()):
        found: str | None = import_own(f"{entry.room}.{entry.files}").identify(path)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Script:
    """Hold a script's function. Made by `plain_script`, `caching_script` and the like."""

    main: Callable[..., None]  # takes the words behind the script's name; None: those of the command line

    def __call__(self, *args: Any, **named: Any) -> None:
        """Run the script in this process."""
        self.main(*args, **named)

    def run(self) -> None:
        """Run the script as a program, with the options of the command line."""
        command_line(self.main, explain=identify)


def plain_script(
    about: str | None,
    work: str,
    *records: type[Options],
    without: Collection[str] = (),
    prepare: Callable[[Any], tuple[Any, ...]] = lambda options: (options,),
) -> Script:
    """Return the script that reads options and hands the first record to a function.

    about: the script's docstring. work: the function, as `networks.merging.merge_flux`, with which torch
    loads. without: as for `add_options`. prepare: makes its arguments of the record.
    """

    def run_tool(argv: Sequence[str] | None = None) -> None:
        options, *_ = parse_options(about, argv, *records, without=without)
        arguments = prepare(options)
        module, _, function = work.rpartition(".")
        getattr(import_own(module), function)(*arguments)

    return Script(run_tool)
