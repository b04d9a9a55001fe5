"""Read the names that people give to models, in any spelling; also names of models without a family here.

Imports nothing that is slow to load.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from downloads.catalogue import ModelSet, families, family_page, family_title, further_name, model_sets
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.options import Options, option
from protocols.families import with_scripts

SOURCES = ("huggingface", "modelscope")

# Models that were trained further from a release here, by the beginnings of their names: the release, and who
# they are. Their files fit its scripts.
_FINE_TUNED = """
stable_diffusion xl: pony illustrious noob animagine juggernaut realvis albedobase dreamshaperxl wai hassaku
stable_diffusion xl: sdxlturbo sdxllightning sdxlhyper lightningxl copax zavychroma cyberrealisticxl bigasp
stable_diffusion 1.5: dreamshaper realisticvision anything counterfeit deliberate abyssorange cyberrealistic
stable_diffusion 1.5: epicrealism majicmix meinamix toonyou revanimated novelai absolutereality
stable_diffusion 2.1: sd2 stablediffusion2
"""
# Models that no family here runs, by the beginnings of their names
_UNSUPPORTED = """
Stable Diffusion 3: sd3 stablediffusion3
Stable Video Diffusion: svd stablevideo
Stable Cascade: stablecascade wuerstchen cascade
CogVideoX: cogvideo cogview
AnimateDiff: animatediff
Chroma1-Radiance: chromaradiance chroma1radiance radiance
HunyuanImage-3.0: hunyuanimage3
Hunyuan-DiT: hunyuandit
LTX-Video 0.9: ltxv ltxvideo ltx09
PixArt: pixart
Kolors: kolors
AuraFlow: auraflow
Mochi: mochi
Cosmos: cosmos
HiDream-I1 and E1: hidreami1 hidreame1
OmniGen: omnigen
Sana: sana
Playground: playground
Kandinsky 2 to 4: kandinsky2 kandinsky3 kandinsky4
DeepFloyd IF: deepfloyd
Open-Sora: opensora
Step-Video: stepvideo
EasyAnimate: easyanimate
Allegro: allegro
BAGEL: bagel
Ovis-Image: ovisimage
Ovi: ovi
LongCat: longcat
Pyramid Flow: pyramidflow
MAGI-1: magi
GLM-Image: glmimage
SkyReels V2 and V3: skyreelsv2 skyreelsv3
"""


SIMILAR_NAME = 0.8  # similarity of a name that is suggested; 1: equal
_COMMON_WORDS = {"video", "image"}  # words that several models have in their names


class NamedModel(NamedTuple):
    """The family and task that a typed model name stands for."""

    family: str
    task: str | None  # None: it names the family alone
    is_fine_tune: bool = False  # whether the name is that of a fine-tune of this model


def plain_name(text: str) -> str:
    """Normalize a name to lowercase letters and digits, so that different spellings compare equal."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def is_task_spelling(text: str, task: str) -> bool:
    """Return whether `text` is a spelling of a task's name; 1.4B is not a spelling of 14B."""
    return plain_name(text) == plain_name(task) and not has_other_number(text, task)


def has_other_number(text: str, task: str) -> bool:
    """Return whether a text has a decimal number such as 1.4 where the task's name has 14."""
    numbers = re.findall(r"\d+(?:\.\d+)?", task)
    decimals = re.findall(r"\d+\.\d+", text)
    return any(number.replace(".", "") in numbers for number in decimals if number not in numbers)


def read_family(text: str, models: Sequence[ModelSet]) -> NamedModel:
    """Read the name of a family, and of a task if one is given, in any spelling.

    Raises:
        OptionError: If the text names none of `models`; the message says what a known name stands for.
    """
    families = list_model_families(models)
    # Map normalized spellings to families: script names, page titles, and the names of the families
    by_spelling = {}
    for name, entry in with_scripts().items():
        if name in families:
            by_spelling[plain_name(entry.script)] = name
    for name in families:
        for spelling in (family_title(name), further_name(name)):
            if spelling:
                by_spelling[plain_name(spelling)] = name
    for name in families:
        by_spelling[plain_name(name)] = name
    family_by_spelling = by_spelling
    exact_match = _match_exact_name(text, family_by_spelling, models) or _resolve_fine_tune(text, models)
    if exact_match is not None:
        return exact_match
    similar = _find_similar(plain_name(text), family_by_spelling, models)
    if len(similar) == 1:
        return similar[0]
    similar_families = list(dict.fromkeys(model.family for model in similar))
    if len(similar_families) == 1:
        return NamedModel(similar_families[0], task=None)
    hint = get_control_page_hint(text)  # the page of a model with control clips
    if not hint and similar_families:
        hint = f" Did you mean {' or '.join(similar_families)}?"
    if not hint:
        hint = _suggest_family(text, family_by_spelling, models)
    raise OptionError(f"--family {text}: choose from {', '.join(families)}.{hint}")


def _suggest_family(text: str, family_by_spelling: Mapping[str, str], models: Sequence[ModelSet]) -> str:
    """Return a hint with the most similar name of a model, or the family whose name the text begins with."""
    # sdxl, with the short name of its family
    names = {plain_name(name): name for name in (further_name(each.family) + each.task for each in models)}
    similar = difflib.get_close_matches(plain_name(text), {**names, **family_by_spelling}, 1, SIMILAR_NAME)
    if similar and similar[0] not in family_by_spelling:
        return f" Did you mean {names[similar[0]]}?"
    prefixes = [spelling for spelling in family_by_spelling if plain_name(text).startswith(spelling)]
    if prefixes:
        return f" Did you mean {family_by_spelling[max(prefixes, key=len)]}?"
    return did_you_mean(text.lower(), list_model_families(models))


def _match_exact_name(
    text: str, family_by_spelling: Mapping[str, str], models: Sequence[ModelSet]
) -> NamedModel | None:
    """Return the model that a text names in full: a family, a family with its task, or a repository."""
    normalized = plain_name(text)
    if normalized in family_by_spelling:
        return NamedModel(family_by_spelling[normalized], task=None)
    for model in models:
        spellings = [name for name, family in family_by_spelling.items() if family == model.family]
        full_names = {plain_name(name + model.task) for name in spellings}
        # normalized names have no dots, so 1.4 would match 14
        if normalized in full_names and not has_other_number(text, model.task):
            return NamedModel(model.family, model.task)
    for model in models:  # the first match counts: the catalogue begins with the most popular tasks
        repository_name = PurePosixPath(model.released_by).name
        if normalized in (plain_name(model.released_by), plain_name(repository_name)):
            return NamedModel(model.family, model.task)
    return None


def _find_similar(
    plain: str, family_by_spelling: Mapping[str, str], models: Sequence[ModelSet]
) -> list[NamedModel]:
    """Return families whose names contain the text `plain`; if there are none, models by their tasks."""
    if len(plain) > 1 and plain not in _COMMON_WORDS:
        # at the beginning of a word: anima is not a part of image
        families = [name for name in family_by_spelling.values() if _begins_a_word(plain, name)]
        families += [name for spelling, name in family_by_spelling.items() if spelling.startswith(plain)]
        names = list(dict.fromkeys(families))
        families = [
            name for name in names if not any(name.startswith(other) for other in names if other != name)
        ]
        if families:
            return [NamedModel(name, task=None) for name in families]
    if len(plain) > 2:
        return [
            NamedModel(model.family, model.task)
            for model in models
            if _begins_a_word(plain, model.task)
            or plain == plain_name(further_name(model.family) + model.task)
        ]
    return []


def _begins_a_word(plain: str, name: str) -> bool:
    """Return whether a word of a name begins with the text `plain`; no word of t2v-14B begins with `4b`."""
    words = re.findall(r"[a-z0-9.]+", name.lower())
    return any(plain_name("".join(words[index:])).startswith(plain) for index in range(len(words)))


def _resolve_fine_tune(text: str, models: Sequence[ModelSet]) -> NamedModel | None:
    """Return the released model from which a known fine-tune was made; None if the name is unknown."""
    # "FAMILY TASK" of a fine-tune's base, or the title of a model that is not supported
    base_or_title = _look_up_prefix(text, _FINE_TUNED + _UNSUPPORTED)
    if base_or_title is None:
        return None
    family, _, task = base_or_title.partition(" ")
    if any((model.family, model.task) == (family, task) for model in models):
        return NamedModel(family, task, is_fine_tune=True)
    image_families = _list_families(models, is_clip=False)
    video_families = _list_families(models, is_clip=True)
    raise OptionError(
        f"--family {text}: {base_or_title} is not supported. For images choose from {image_families}; for "
        f"clips from {video_families}"
    )


def name_unsupported(text: str) -> str | None:
    """Return the title of a known, unsupported model if the text begins with its name; None otherwise."""
    return _look_up_prefix(text, _UNSUPPORTED)


def _look_up_prefix(text: str, table: str) -> str | None:
    """Return the entry of `table` whose key is the longest prefix of `text`; None if no key is a prefix."""
    plain = plain_name(text)
    beginnings: dict[str, str] = {}
    for line in table.split("\n"):
        subject, _, names = line.partition(": ")
        beginnings |= dict.fromkeys(names.split(), subject)
    fitting = [name for name in beginnings if plain.startswith(name)]
    return beginnings[max(fitting, key=len)] if fitting else None


def _list_families(models: Sequence[ModelSet], is_clip: bool) -> str:
    """Return a phrase that lists the families of video models, or of image models."""
    trained = [model for model in models if "train" in model.commands]
    return ", ".join(
        list_model_families([model for model in trained if (model.properties["frames"] != 1) == is_clip])
    )


def reject_fine_tune(named: NamedModel, text: str, models: Sequence[ModelSet]) -> None:
    """Raise OptionError, with the options to use instead, if the typed name denotes a fine-tuned model."""
    if not named.is_fine_tune:
        return
    (model,) = (model for model in models if (model.family, model.task) == (named.family, named.task))
    option = next(part.option for part in model.components if part.option)
    family = further_name(named.family) + model.task
    raise OptionError(
        f"--family {text}: it is a {family_title(named.family)} {model.task} with weights of its own. Pass "
        f"`new` --family {family} --model_file {option.lstrip('-')}=FILE, with its file"
    )


def list_model_families(models: Sequence[ModelSet]) -> list[str]:
    """Return the families of model sets, each once, in order of appearance."""
    return list(dict.fromkeys(model.family for model in models))


def get_control_page_hint(text: str) -> str:
    """Return a hint to the documentation if `text` names a model trained with control clips, else ""."""
    plain = plain_name(text)
    for model in model_sets():
        if not model.properties.get("control"):
            continue
        title = family_title(model.family)
        is_exact = plain in {plain_name(model.family), plain_name(model.task), plain_name(title)}
        if is_exact or (len(plain) > 2 and plain in plain_name(model.task)):
            return (
                f" {title} {model.task} learns from control clips, which `new` does not describe: see "
                f"docs/{family_page(model.family)}."
            )
    return ""


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
