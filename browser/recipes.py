"""Turn what the form Generate holds into a generation: its command line, and its request to a loaded model.

A recipe is what a model, or a run, fixes of a command: the script, the model's files, its task. Fields of the
form are options of a prompt line, by their letters in the family's script, so both say the same.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from browser.compare import PLACEHOLDER, ComparableRun, group_options
from contract.families import with_scripts
from downloads.catalogue import ModelSet, model_sets
from generation.prompt_lines import LineOption
from generation.script_options import ScriptDefaults
from modules.errors import OptionError
from modules.installation import import_own
from modules.option_values import option_words

LORA = "--lora_weight"
STRENGTHS = "--lora_multiplier"
SAVE_PATH = "--save_path"
RESULTS = "generated"  # folder of results, in a root or in the output folder of a run
# letter of a prompt line's option by the name of the field, in the order in which a command shows them
# fmt: off
LETTERS = {
    "negative": "n", "width": "w", "height": "h", "frames": "f", "steps": "s", "guidance": "g",
    "seed": "d", "start": "i", "end": "ei", "references": "ci",
}
# fmt: on
SIZES = {"video_size_width": 1, "video_size_height": 0}  # keys of sides: places in the option of both
# options that a form sets itself, besides those of its fields
REPLACED = {"--prompt", SAVE_PATH, LORA, STRENGTHS, "--num_videos", "--num_images", "--from_file"}


class UsedLora(NamedTuple):
    """A LoRA file of a generation, and its strength as it was typed."""

    path: str
    strength: str


@dataclass(frozen=True)
class Recipe:
    """Hold what a model or a run fixes of a generation."""

    title: str
    family: str  # as scripts name it
    fixed: Mapping[str, Sequence[str]]  # options of the model, with the words that follow
    usual: Mapping[str, str]  # what fields hold before they are changed, by the name of the field
    folder: Path  # in which the command is typed
    missing: Sequence[str] = ()  # files of the model that are not there
    loras: Sequence[UsedLora] = ()  # of the run

    @property
    def script(self) -> str:
        return f"{with_scripts()[self.family].generation_script}.py"

    @property
    def defaults(self) -> ScriptDefaults:
        """Return the defaults of the family's script."""
        defaults: ScriptDefaults = import_own(with_scripts()[self.family].generation_script).DEFAULTS
        return defaults

    def option_of(self, name: str) -> LineOption | None:
        """Return the option of a prompt line that a field sets; None if the script has none."""
        return self.defaults.line_options.get(LETTERS[name])

    @property
    def fields(self) -> list[str]:
        """Return the fields that the model has."""
        return [name for name in LETTERS if self.option_of(name) is not None]


def flag_of(key: str, defaults: ScriptDefaults) -> str:
    """Return the flag on the command line for a key of a prompt line's option."""
    name = "video_size" if key in SIZES else key
    spelled = defaults.spelled.get(name)
    return spelled[0] if spelled else f"--{name}"


def recipe_of_model(model: ModelSet, models: Path, folder: Path) -> Recipe:
    """Return the recipe of a released model. models: folder of its files. folder: the working folder."""
    families = {f"{entry.generation_script}.py": name for name, entry in with_scripts().items()}
    _, script, *words = shlex.split(model.commands["generate"])
    paths = {f"{{{part.option.lstrip('-')}}}": part.path for part in model.components if part.option}
    options = {}
    missing = []
    for name, texts in group_options(words).items():
        options[name] = [str(models / paths[text]) if text in paths else text for text in texts]
        missing += [str(models / paths[text]) for text in texts if text in paths]
    return _make_recipe(
        title=f"{model.family} {model.task}",
        family=families[script],
        options=options,
        folder=folder,
        missing=[path for path in missing if not (folder / path).exists()],
    )


def recipe_of_run(source: ComparableRun) -> Recipe:
    """Return the recipe of a run, from the command that its history has. Raises OptionError without one."""
    missing = []
    options = {}
    for name, words in source.options.items():
        options[name] = [word for word in words if not PLACEHOLDER.fullmatch(word)]
        if len(options[name]) < len(words) and name not in REPLACED:
            missing.append(name)
            del options[name]
    return _make_recipe(
        title=source.run.name,
        family=source.family,
        options=options,
        folder=source.working_folder,
        missing=missing,
    )


def _make_recipe(
    title: str,
    family: str,
    options: Mapping[str, Sequence[str]],
    folder: Path,
    missing: Sequence[str],
) -> Recipe:
    """Split the options of a command into those that are fixed and those that fields show."""
    defaults: ScriptDefaults = import_own(with_scripts()[family].generation_script).DEFAULTS
    flags: dict[str, str] = {}  # name of the field by flag
    for name, letter in LETTERS.items():
        if letter in defaults.line_options:
            key = defaults.line_options[letter].key
            if key not in SIZES:
                flags[flag_of(key, defaults)] = name
    size_flag = flag_of("video_size_width", defaults)
    usual = {"height": str(defaults.size[0]), "width": str(defaults.size[1])}
    fixed: dict[str, Sequence[str]] = {}
    for flag, words in options.items():
        if flag in (size_flag, "--video_size") and len(words) == 2:
            usual |= {"height": words[0], "width": words[1]}
        elif flag in flags:
            usual[flags[flag]] = " ".join(words)
        elif flag == "--prompt":
            usual["prompt"] = " ".join(words)
        elif flag not in REPLACED:
            fixed[flag] = words
    strengths = list(options.get(STRENGTHS, ()))
    strengths += ["1"] * (len(options.get(LORA, ())) - len(strengths))
    loras = [
        UsedLora(path, strength) for path, strength in zip(options.get(LORA, ()), strengths, strict=False)
    ]
    return Recipe(
        title=title,
        family=family,
        fixed=fixed,
        usual=usual,
        folder=folder,
        missing=missing,
        loras=loras,
    )


@dataclass(frozen=True)
class Wish:
    """What is to be made: a recipe, and what the fields hold."""

    recipe: Recipe
    prompt: str
    texts: Mapping[str, str]  # by the name of the field; empty texts leave the model's default
    loras: Sequence[UsedLora]
    save_path: str
    references: Sequence[str] = ()  # pictures to edit
    files: Mapping[str, str] = field(default_factory=dict)  # start and end picture

    def check(self) -> None:
        """Raise OptionError for what no command can be made of."""
        if not self.prompt.strip():
            raise OptionError("Prompt: write what is to be made.")
        if self.recipe.missing:
            raise OptionError(f"{self.recipe.missing[0]} is missing: load the model first (Models).")
        for lora in self.loras:
            try:
                float(lora.strength)
            except ValueError:
                raise OptionError(f"{lora.strength}: give the strength as a number, such as 0.8") from None
        for name, text in self.texts.items():
            option = self.recipe.option_of(name)
            if option is None or not text.strip():
                continue
            try:
                option.read(text.strip())
            except ValueError as error:
                raise OptionError(f"{name.capitalize()}: {error}") from None

    @property
    def session_words(self) -> list[str]:
        """Return the command that loads the model for requests; strengths are said with each request."""
        recipe = self.recipe
        words = ["python", recipe.script, *option_words(dict(recipe.fixed))]
        if self.loras:
            words += option_words({LORA: [lora.path for lora in self.loras]})
        return [*words, "--interactive", SAVE_PATH, self.save_path]

    def request(self, seed: str) -> dict[str, Any]:
        """Return the request of `generation/driven.py` for one result."""
        options: dict[str, Any] = {}
        for name, text in (dict(self.texts) | {"seed": seed}).items():
            if text.strip() and self.recipe.option_of(name) is not None:
                options[LETTERS[name]] = text.strip()
        if self.references:
            options[LETTERS["references"]] = list(self.references)
        if self.loras:
            options["m"] = ",".join(lora.strength for lora in self.loras)
        return {"prompt": self.prompt, "options": options}

    def command(self, seed: str) -> list[str]:
        """Return the command line that makes the same result."""
        recipe = self.recipe
        defaults = recipe.defaults
        options: dict[str, Any] = {**recipe.fixed}
        if self.loras:
            options[LORA] = [lora.path for lora in self.loras]
            options[STRENGTHS] = [lora.strength for lora in self.loras]
        options["--prompt"] = self.prompt
        sides = ["", ""]
        for name, text in (dict(self.texts) | {"seed": seed}).items():
            option = recipe.option_of(name)
            if option is None or not text.strip():
                continue
            if option.key in SIZES:
                sides[SIZES[option.key]] = text.strip()
            else:
                options[flag_of(option.key, defaults)] = text.strip()
        if all(sides):
            options[flag_of("video_size_width", defaults)] = sides
        if self.references:
            reference_option = recipe.option_of("references")
            assert reference_option is not None, "the form has no field for them otherwise"
            options[flag_of(reference_option.key, defaults)] = list(self.references)
        return ["python", recipe.script, *option_words(options), SAVE_PATH, self.save_path]


def find_model_set(family: str, task: str) -> ModelSet | None:
    """Return a released model that generates; None for an unknown one."""
    for model in model_sets():
        if (model.family, model.task) == (family, task) and "generate" in model.commands:
            return model
    return None
