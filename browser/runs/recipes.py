"""Turn the form Generate into a generation: its command line, and its request to a loaded model.

A recipe is the part of a command that a model or a run fixes: script, model files and task. Fields of the
form are options that a prompt line may have, by their names on the command line, so both mean the same.
"""

import math
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from browser.jobs.render_queue import RenderJob
from browser.runs.comparable_runs import PLACEHOLDER, ComparableRun, group_options
from downloads.catalogue import ModelSet, model_sets
from generation.prompt_lines import LineOption, find_option
from generation.script_options import ScriptDefaults
from modules.installation import import_own
from modules.limits import MAX_MADE_FRAMES, MAX_SCALE, MAX_SIDE, MAX_STEPS
from modules.media.reading import VIDEO_SUFFIXES
from modules.option_tables import list_rows
from modules.option_values import option_argv
from modules.pages.language import refusal, say
from modules.text_files import bad_character
from project.model_sizes import find_memory
from protocols.families import HIGH_NOISE, with_scripts

LORA = "--lora_weight"
STRENGTHS = "--lora_multiplier"
RESULTS = "generated"  # folder of results, in a root or in the output folder of a run
MAX_STRENGTH = 1000  # maximum strength of a LoRA, as in training
MAX_TEXT_LENGTH = 30_000  # characters; Linux limits an argument to 131,072 bytes
# form field -> options that it may set; the first one that the script has is used. The fields are in the
# order in which a command lists them
FIELDS: Mapping[str, Sequence[str]] = {
    "negative": ["negative_prompt"],
    "width": ["video_size_width"],
    "height": ["video_size_height"],
    "frames": ["video_length", "video_seconds"],
    "layers": ["output_layers"],
    "steps": ["infer_steps"],
    "guidance": ["embedded_cfg_scale", "guidance_scale"],
    "cfg": ["guidance_scale"],  # for models whose `guidance` is embedded
    "high_cfg": [f"guidance_scale_{HIGH_NOISE}"],
    "seed": ["seed"],
    "start": ["image_path"],
    "end": ["end_image_path"],
    "control": ["control_path"],
    "references": ["control_image_path"],
    "redraw": ["i2i_path", "video_path"],
    "share": ["denoise"],  # fraction of `redraw` that is generated anew
}
IMAGES = ("start", "end", "control", "references", "redraw")  # fields that contain paths
SIDES = ("width", "height")
# key of each side -> its index in the values of --video_size
SIDE_POSITIONS = {
    "video_size_width": 1,
    "video_size_height": 0,
}
SIZE = "video_size"
# options that the form sets itself, in addition to the options of its fields
# fmt: off
FORM_OPTIONS = {
    "prompt", "save_path", "lora_weight", "lora_multiplier", f"lora_weight_{HIGH_NOISE}",
    f"lora_multiplier_{HIGH_NOISE}", "num_videos", "from_file", "interactive", "preview_latent_every",
}
# fmt: on
EXAMPLE_FILES = {"start.png", "end.png", "control.mp4"}  # placeholders in commands of the catalogue
ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)  # width by height
TASK_FLAGS = ("--task", "--model_version")  # what a model of a script makes, and from which images
HALF_PRECISION_FLAGS = ("--fp16", "--bf16")  # switches for a graphics card in the catalogue's commands
SHAPE_STEP = 32  # pixels; all models accept multiples of it


class UsedLora(NamedTuple):
    """A LoRA file to generate with, its typed strength, and the expert to which it is applied."""

    path: str
    strength: str
    expert: str = ""  # "" for `--lora_weight`, or HIGH_NOISE


@dataclass(frozen=True)
class ModelRecipe:
    """A model or run to generate with: its fixed options, and the initial values of the form's fields."""

    title: str
    family: str  # as scripts name it
    fixed_options: Mapping[str, Sequence[str]]  # options of the model, with their arguments
    initial_texts: Mapping[str, str]  # initial values of the fields, by name
    folder: Path  # working folder of the command
    missing_files: Sequence[str] = ()  # files of the model that do not exist
    unfilled_options: Sequence[str] = ()  # fixed options for which the command has only a placeholder
    loras: Sequence[UsedLora] = ()  # LoRAs of the command
    required_images: Sequence[str] = ()  # fields that must be filled
    paths: Sequence[str] = ()  # paths of images that the command names
    file_defaults: Mapping[str, Any] = field(default_factory=dict)  # defaults of its files: `ModelSet.usual`

    @property
    def script(self) -> str:
        """File name of the family's generation script."""
        return f"{with_scripts()[self.family].generation_script}.py"

    @cached_property
    def defaults(self) -> ScriptDefaults:
        """Defaults of the family's script."""
        defaults: ScriptDefaults = import_own(with_scripts()[self.family].generation_script).DEFAULTS
        return defaults

    @property
    def extra_options(self) -> Mapping[str, str]:
        """Options of the family that a request passes as extras, with their names in the request."""
        return list_extras(self.family)

    @cached_property
    def option_keys(self) -> dict[str, str]:
        """Option that each form field sets, by field name, for the fields that the model uses."""
        keys = find_field_keys(self.defaults, self.extra_options)
        unused_fields = []
        if not self.has_experts:
            unused_fields.append("high_cfg")  # CFG scale of the high-noise expert
        for name in ("start", "end", "control", "references"):
            is_in_command = name in self.required_images or bool(self.initial_texts.get(name))
            if not is_in_command and not self._may_accept(name):
                unused_fields.append(name)
        # only the commands of releases that split images into layers have this option
        if not self.initial_texts.get("layers"):
            unused_fields.append("layers")
        if "redraw" not in keys:  # `share` is the fraction of `redraw` that is generated anew
            unused_fields.append("share")
        return {name: key for name, key in keys.items() if name not in unused_fields}

    def _may_accept(self, name: str) -> bool:
        """Return whether the model can use an image that its command does not require."""
        task = self._task_record
        if task is None:
            return name == "references" or not _is_required_by_other_model(self.script, name)
        takes_references = bool(getattr(task, "takes_references", False))
        match name:
            case "start":
                return bool(task.requires_image or task.takes_clean_first_frame)
            case "end":
                return bool(task.requires_image)
            case "control":
                return bool(task.has_control or takes_references)
            case _:  # references
                return takes_references

    @property
    def _task_record(self) -> Any:
        """Return the family's configuration of the command's --task; None for a family without tasks."""
        tasks = vars(with_scripts()[self.family].options).get("TASKS", {})
        return tasks.get("".join(self.fixed_options.get("--task", ())))

    @property
    def has_experts(self) -> bool:
        """Whether the model has a second transformer for high noise, with LoRAs of its own."""
        return self.defaults.has_experts and f"--dit_{HIGH_NOISE}" in self.fixed_options

    @property
    def counts_seconds(self) -> bool:
        """Whether the length of a result is given in seconds instead of frames."""
        return self.option_keys.get("frames") == "video_seconds"

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes `guidance` as an input, so that a value of 1 does not turn it off."""
        return self.option_keys.get("guidance") == "embedded_cfg_scale"

    def find_line_option(self, name: str) -> LineOption | None:
        """Return the prompt-line option that a field sets; None if the model has no such field."""
        key = self.option_keys.get(name)
        return None if key is None else find_option(key, self.defaults.line_options)

    @property
    def fields(self) -> list[str]:
        """Names of the form fields that the model supports."""
        return list(self.option_keys)

    def find_default(self, name: str) -> str:
        """Return the value that applies if the Generate form's field `name` is empty; "" if it is unknown.

        `file_defaults` (from the model's files) take precedence, then the defaults of the task, then the
        defaults of the generation script.
        """
        scale = self.defaults.guidance_scale
        values: dict[str, Any] = {
            "steps": self.defaults.infer_steps,
            "guidance": self.defaults.embedded_guidance if self.embeds_guidance else scale,
            "cfg": scale,
            "frames": self.defaults.video_length,
            "share": self.defaults.source.denoise,
        }
        task = self._task_record
        if task is not None:
            task_defaults = {
                "steps": task.steps,
                "guidance": task.guidance,
                "high_cfg": task.high_noise_guidance,
                "frames": task.frames,
            }
            # a task that does not set a value has None or 0
            values |= {field: value for field, value in task_defaults.items() if value}
        values |= self.file_defaults
        value = values.get(name)
        return "" if value in (None, "") else f"{value:g}"

    def find_limits(self, name: str) -> tuple[float, float]:
        """Return the minimum and maximum of a numeric field, which are infinite if it has no limits."""
        # embedded guidance cannot be negative, a CFG scale can
        minimum = 0 if name == "guidance" and self.embeds_guidance else -MAX_SCALE
        max_seconds = MAX_MADE_FRAMES / self.defaults.fps
        limits: dict[str, tuple[float, float]] = {
            **dict.fromkeys(SIDES, (1, MAX_SIDE)),
            "steps": (1, MAX_STEPS),
            # the field contains seconds or frames, as the script's option does
            "frames": (0, max_seconds) if self.counts_seconds else (1, MAX_MADE_FRAMES),
            "layers": (1, MAX_MADE_FRAMES),
            "guidance": (minimum, MAX_SCALE),
            "cfg": (-MAX_SCALE, MAX_SCALE),
            "high_cfg": (-MAX_SCALE, MAX_SCALE),
            "share": (0, 1),
        }
        return limits.get(name, (-math.inf, math.inf))

    @property
    def side_step(self) -> int:
        """Number of pixels of which every width and height is a multiple."""
        step: int = getattr(self._task_record, "side_step", self.defaults.side_step)
        return step

    def nearest(self, name: str, value: float) -> float:
        """Return the nearest value to `value` that the model accepts in the field `name`."""
        if name in SIDES:
            return max(1, round(value / self.side_step)) * self.side_step
        if name != "frames" or self.counts_seconds:
            return value
        lengths = self.defaults.lengths
        fits = lengths.fit(int(value)), lengths.fit(int(value) + lengths.step)
        return min(fits, key=lambda frames: abs(frames - value))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Common sizes (width, height) with about the pixel count of the model's default size."""
        try:
            width = int(self.initial_texts.get("width", ""))
            height = int(self.initial_texts.get("height", ""))
        except ValueError:
            return []
        sizes = [(width, height), (height, width)]
        for aspect in ASPECTS:
            side = (width * height * aspect) ** 0.5
            rounded = [max(1, round(length / SHAPE_STEP)) * SHAPE_STEP for length in (side, side / aspect)]
            sizes.append((rounded[0], rounded[1]))
        return list(dict.fromkeys(sizes))


@cache
def list_extras(family: str) -> dict[str, str]:
    """Return a family's own generation options, by option key, with their names in `RenderRequest.extras`."""
    rows = list_rows(f"{with_scripts()[family].generation_script}.py")
    return {name: row["noted"]["extra"] for name, row in rows.items() if "extra" in row.get("noted", {})}


def find_field_keys(defaults: ScriptDefaults, extra_options: Mapping[str, str]) -> dict[str, str]:
    """Return the option that each form field sets in a generation script, by field name.

    The option is the first one in `FIELDS` that the script accepts in prompt lines. Fields without such an
    option are missing.

    Args:
        defaults: The script's defaults; they also tell which shared options it lacks.
        extra_options: Options that only this family has.
    """
    declared = defaults.declared()
    unsupported_options = {*declared["without"], *declared["refused"]}
    # width and height are not options of their own, but the values of --video_size
    supported_anyway = {*extra_options, *SIDE_POSITIONS}
    keys = {}
    for name, candidates in FIELDS.items():
        if name == "cfg" and defaults.embedded_guidance is None:  # the field `guidance` sets the CFG scale
            continue
        # with guidance distilled into the model, there is no pass with a negative prompt
        if name in ("negative", "guidance") and defaults.builds_in_guidance:
            continue
        for key in candidates:
            is_supported = key in supported_anyway or key not in unsupported_options
            if is_supported and find_option(key, defaults.line_options) is not None:
                keys[name] = key
                break
    return keys


def _is_required_by_other_model(script: str, name: str) -> bool:
    """Return whether a released model with the same script has the field `name` in its command."""
    flags = {f"--{key}" for key in FIELDS[name]}
    for model in model_sets():
        words = model.commands.get("generate", "").split()
        if script in words and flags.intersection(words):
            return True
    return False


def find_flag(key: str, defaults: ScriptDefaults) -> str:
    """Return the command-line flag for the key of a prompt-line option."""
    if key == "denoise":
        return f"--{defaults.source.denoise_option}"
    name = SIZE if key in SIDE_POSITIONS else key
    flags = defaults.flags_by_option.get(name)
    return flags[0] if flags else f"--{name}"


def to_command_options(values: Mapping[str, Any], defaults: ScriptDefaults) -> dict[str, Any]:
    """Convert options of a prompt line, by key, to command-line options, by flag."""
    options: dict[str, Any] = {}
    size = ["", ""]  # height, width
    for key, value in values.items():
        if key in SIDE_POSITIONS:
            size[SIDE_POSITIONS[key]] = str(value)
        else:
            options[find_flag(key, defaults)] = value
    if all(size):
        options[find_flag(SIZE, defaults)] = size
    return options


def _find_key(flag: str, defaults: ScriptDefaults) -> str:
    """Return the option key of a flag in any of its spellings."""
    for key, flags in defaults.flags_by_option.items():
        if flag in flags:
            return key
    if flag in ("--strength", "--v2v_denoise", "--denoise_strength"):
        return "denoise"
    return flag.removeprefix("--").replace("-", "_")


def can_generate(model: ModelSet) -> bool:
    """Return whether pages can generate with a model, which requires a script that takes requests."""
    scripts = {f"{entry.generation_script}.py" for entry in with_scripts().values()}
    has_request_script = bool(scripts.intersection(model.commands.get("generate", "").split()))
    return has_request_script and not model.has_adapter


def make_model_recipe(model: ModelSet, models: Path, folder: Path) -> ModelRecipe:
    """Return the recipe of a released model with its files in `models`; `folder` is the working folder."""
    families = {f"{entry.generation_script}.py": name for name, entry in with_scripts().items()}
    _, script, *argv = shlex.split(model.commands["generate"])  # python SCRIPT OPTIONS
    # paths of the model's files by their placeholders in commands, such as {dit}
    path_by_placeholder = {}
    for component in model.components:
        if component.option:
            name = component.option.lstrip("-")
            path_by_placeholder[f"{{{name}}}"] = str(models / component.path)
    options: dict[str, list[str]] = {}
    required_files = []
    for flag, words in group_options(argv).items():
        options[flag] = [path_by_placeholder.get(word, word) for word in words]
        required_files += [path_by_placeholder[word] for word in words if word in path_by_placeholder]
    options.pop("--seed", None)  # each result gets its own seed
    if not find_memory():  # CPUs are many times slower in 16 bits than in 32
        options = {flag: words for flag, words in options.items() if flag not in HALF_PRECISION_FLAGS}
    return _make_command_recipe(
        title=say(model.title),
        family=families[script],
        options=options,
        folder=folder,
        missing_files=[path for path in required_files if not (folder / path).exists()],
        is_placeholder=lambda word: word in EXAMPLE_FILES,
        file_defaults=model.usual,
    )


def make_run_recipe(source: ComparableRun) -> ModelRecipe:
    """Return the recipe to generate with a run's model, from the generation command in its history."""
    names = {Path(word).name for words in source.options.values() for word in words}
    recipe = _make_command_recipe(
        title=source.run.name,
        family=source.family,
        options=source.options,
        folder=source.working_folder,
        missing_files=[],
        is_placeholder=lambda word: word in source.unfilled_words or PLACEHOLDER.fullmatch(word) is not None,
        file_defaults=_find_defaults(source.family, names),
    )
    # A run that was trained without sample images has a command without any, although its model edits one.
    required = []
    for model in filter(can_generate, model_sets()):
        if recipe.script not in model.commands["generate"].split():
            continue
        released = make_model_recipe(model, recipe.folder, recipe.folder)
        if all(released.fixed_options.get(flag) == recipe.fixed_options.get(flag) for flag in TASK_FLAGS):
            required.append(set(released.required_images))
    released_images = [name for name in IMAGES if required and name in set.intersection(*required)]
    return replace(recipe, required_images=list(dict.fromkeys([*recipe.required_images, *released_images])))


def _find_defaults(family: str, names: Collection[str]) -> Mapping[str, Any]:
    """Return the usual options of the released model whose transformer is among `names`; {} if unknown."""
    script = f"{with_scripts()[family].generation_script}.py"
    for model in model_sets():
        transformers = {Path(part.path).name for part in model.components if part.role == "transformer"}
        if transformers & set(names) and script in model.commands.get("generate", "").split():
            return model.usual
    return {}


@dataclass(frozen=True)
class _CommandOption:
    """An option of a generation command, and the field of the Generate page that shows it."""

    flag: str
    key: str
    field: str | None  # field of the page that shows it
    values: list[str]  # without placeholders
    has_placeholder: bool  # the command had a placeholder here

    @property
    def is_size(self) -> bool:
        return self.key == SIZE and len(self.values) == 2

    @property
    def is_fixed(self) -> bool:
        """Whether the page's commands always use the option's value unchanged, because no field shows it."""
        is_shown = self.is_size or self.field is not None or self.key == "prompt"
        return not is_shown and self.key not in FORM_OPTIONS


def _make_command_recipe(
    title: str,
    family: str,
    options: Mapping[str, Sequence[str]],
    folder: Path,
    missing_files: Sequence[str],
    is_placeholder: Callable[[str], bool],
    file_defaults: Mapping[str, Any],
) -> ModelRecipe:
    """Return the recipe of a command, in which each option is fixed or the initial value of a form field."""
    # 1. Find the form field that sets each option; options without a field are fixed.
    # 2. Words that are placeholders give no value. The user has to fill their fields.
    # 3. Take the LoRAs, and the initial values of the fields, from the command.
    defaults: ScriptDefaults = import_own(with_scripts()[family].generation_script).DEFAULTS
    command_options = _list_command_options(family, defaults, options, is_placeholder)
    fixed_options = [option for option in command_options if option.is_fixed]
    # fields for which the command has only a placeholder: the user has to fill them
    unfilled_fields = [
        option.field for option in command_options if option.has_placeholder and not option.is_size
    ]
    values_by_key = {option.key: option.values for option in command_options}
    initial_texts = _list_initial_texts(command_options, defaults)
    return ModelRecipe(
        title=title,
        family=family,
        fixed_options={option.flag: option.values for option in fixed_options},
        initial_texts=initial_texts,
        folder=folder,
        missing_files=missing_files,
        unfilled_options=[option.flag for option in fixed_options if option.has_placeholder],
        loras=[*_read_loras(values_by_key, ""), *_read_loras(values_by_key, HIGH_NOISE)],
        required_images=[name for name in unfilled_fields if name in IMAGES],
        paths=[path for name in IMAGES for path in initial_texts.get(name, "").splitlines()],
        file_defaults=file_defaults,
    )


def _list_command_options(
    family: str,
    defaults: ScriptDefaults,
    options: Mapping[str, Sequence[str]],
    is_placeholder: Callable[[str], bool],
) -> list[_CommandOption]:
    """Return the options of a generation command, each with its form field and without placeholders."""
    field_keys = find_field_keys(defaults, list_extras(family))
    field_by_key: dict[str, str | None] = {key: name for name, key in field_keys.items()}
    # the field for an image to redraw also accepts a clip
    field_by_key["video_path"] = field_by_key.get("i2i_path")
    command_options = []
    for flag, words in options.items():
        key = _find_key(flag, defaults)
        values = [word for word in words if not is_placeholder(word)]
        has_placeholder = len(values) < len(words)
        command_options.append(_CommandOption(flag, key, field_by_key.get(key), values, has_placeholder))
    return command_options


def _list_initial_texts(options: Sequence[_CommandOption], defaults: ScriptDefaults) -> dict[str, str]:
    """Return the initial values of the Generate form's fields, by name."""
    # They come from the options of a command; width and height default to the script's size.
    height, width = (str(side) for side in defaults.size)
    texts = {"height": height, "width": width}
    for option in options:
        if option.is_size:
            texts |= {"height": option.values[0], "width": option.values[1]}
        elif option.field is not None:
            separator = "\n" if option.field == "references" else " "  # one reference image per line
            texts[option.field] = separator.join(option.values)
        elif option.key == "prompt":
            texts["prompt"] = " ".join(option.values)
    return texts


def _read_loras(values_by_key: Mapping[str, Sequence[str]], expert: str) -> list[UsedLora]:
    """Return the LoRAs of an expert, from the values of a command's options; strengths default to 1."""
    end = f"_{expert}" if expert else ""
    paths = values_by_key.get(f"lora_weight{end}", ())
    strengths = [*values_by_key.get(f"lora_multiplier{end}", ()), *["1"] * len(paths)]
    return [UsedLora(path, strength, expert) for path, strength in zip(paths, strengths, strict=False)]


@dataclass(frozen=True)
class RenderRequest:
    """A request for a result: the model with its fixed options, the prompt, and the other fields' values."""

    recipe: ModelRecipe
    prompt: str
    texts: Mapping[str, str]  # by the name of the field; "" stands for the model's default
    loras: Sequence[UsedLora]
    save_path: str
    references: Sequence[str] = ()  # images to edit
    labels: Mapping[str, str] = field(default_factory=dict)  # labels of fields, for messages

    def check(self) -> None:
        """Raise OptionError if a text, number, LoRA, image or the model of the Generate form is not valid."""
        if not self.prompt.strip():
            raise refusal("Prompt: describe what to generate.")
        for name, text in {"prompt": self.prompt, **self.texts}.items():
            self._check_characters(name, text)
        self._check_recipe()
        for lora in self.loras:
            self._check_lora(lora)
        for name, text in self.texts.items():
            if text.strip() and name in self.recipe.fields:
                self._check_text(name, text.strip())
        has_one_side = bool(self._field_text("width")) != bool(self._field_text("height"))
        if "width" in self.recipe.fields and has_one_side:
            raise refusal("Width and Height: set both, or neither for the model's usual size.")
        for name in IMAGES:
            self._check_images(name)

    def _check_characters(self, name: str, text: str) -> None:
        """Raise OptionError if a text is too long, or contains a character that commands may not contain."""
        character = bad_character(text)
        if character is not None:
            raise refusal(
                "%(label)s: omit %(character)s.", label=self._field_label(name), character=character
            )
        if len(text) > MAX_TEXT_LENGTH:
            raise refusal(
                "%(label)s has %(n)s characters: at most %(most_of_text)s are accepted, and "
                "models read far fewer.",
                label=self._field_label(name),
                n=f"{len(text):,}",
                most_of_text=f"{MAX_TEXT_LENGTH:,}",
            )

    def _check_recipe(self) -> None:
        """Raise OptionError if the model, or an image that it requires, is missing."""
        recipe = self.recipe
        if recipe.missing_files:
            raise refusal(
                "%(missing)s is missing: download the model first (Models).", missing=recipe.missing_files[0]
            )
        if recipe.unfilled_options:
            raise refusal(
                "%(title)s was trained without %(missing)s, which generation needs.",
                title=recipe.title,
                missing=recipe.unfilled_options[0],
            )
        for name in recipe.required_images:
            is_filled = self.references if name == "references" else self.texts.get(name, "").strip()
            if not is_filled:
                raise refusal(
                    "%(label)s: this model needs one. Drop it on the field.", label=self._field_label(name)
                )

    def _check_images(self, name: str) -> None:
        """Raise OptionError if a file named in a field does not exist."""
        if name not in self.recipe.fields:
            return
        paths = self.references if name == "references" else [self._field_text(name)]
        for path in filter(None, paths):
            if not (self.recipe.folder / path).is_file():
                raise refusal(
                    "%(label)s %(path)s: there is no such file.", label=self._field_label(name), path=path
                )

    def _field_label(self, name: str) -> str:
        return self.labels.get(name, name.capitalize())

    def _field_text(self, name: str) -> str:
        return self.texts.get(name, "").strip()

    def _check_lora(self, lora: UsedLora) -> None:
        """Raise OptionError if a LoRA's strength is not a number or too large, or if its file is missing."""
        name = Path(lora.path).name
        try:
            is_number = abs(float(lora.strength)) <= MAX_STRENGTH
        except ValueError:
            is_number = False
        if not is_number:
            raise refusal(
                "strength %(strength)s of %(name)s: use a number, such as 0.8",
                strength=lora.strength,
                name=name,
            )
        if not (self.recipe.folder / lora.path).is_file():
            raise refusal("%(path)s no longer exists. Choose another LoRA", path=lora.path)

    def _check_text(self, name: str, text: str) -> None:
        """Raise OptionError if the text of a field is not a valid value of its option."""
        option = self.recipe.find_line_option(name)
        assert option is not None, f"the model has no field {name}"
        try:
            value = option.read(text)
        except ValueError as error:
            raise refusal("%(label)s: %(error)s", label=self._field_label(name), error=error) from None
        if not isinstance(value, (int, float)):  # only numbers have limits
            return
        self._check_limits(name, text, value)

    def _check_limits(self, name: str, text: str, value: float) -> None:
        """Raise OptionError if the number in a field is outside its limits, or not a multiple of its step."""
        minimum, maximum = self.recipe.find_limits(name)
        if not minimum <= value <= maximum:
            kind = say("share") if name == "share" else say("number")
            raise refusal(
                "%(label)s %(text)s: use a %(what)s from %(minimum)s to %(maximum)s",
                label=self._field_label(name),
                text=text,
                what=kind,
                minimum=f"{minimum:,g}",
                maximum=f"{maximum:,g}",
            )
        nearest = self.recipe.nearest(name, value)
        if nearest != value:
            rule = say("a length of %(lengths)s", lengths=self.recipe.defaults.lengths)
            if name in SIDES:
                rule = say("a multiple of %(side_step)s", side_step=self.recipe.side_step)
            raise refusal(
                "%(label)s %(text)s: use %(rule)s. Nearest: %(near)s",
                label=self._field_label(name),
                text=text,
                rule=rule,
                near=nearest,
            )

    def _lora_options(self) -> dict[str, list[str]]:
        """Return the LoRA paths by option (one option for each expert), without strengths."""
        options: dict[str, list[str]] = {}
        for lora in self.loras:
            options.setdefault(_with_expert(LORA, lora.expert), []).append(lora.path)
        return options

    def _lora_strengths(self, expert: str) -> list[str]:
        return [lora.strength.strip() for lora in self.loras if lora.expert == expert]

    def _line_values(self, seed: str) -> dict[str, str]:
        """Return the prompt-line options, by key, from the form's filled fields and a seed."""
        # The callers add the reference images, because they are a list.
        values: dict[str, str] = {}
        for name, key in self.recipe.option_keys.items():
            if name in ("references", "share"):  # `share` is set together with `redraw`
                continue
            text = seed if name == "seed" else self._field_text(name)
            if not text:
                continue
            if name == "redraw":
                denoising_strength = self._field_text("share")
                if denoising_strength:
                    values["denoise"] = denoising_strength
                is_clip = Path(text).suffix.lower() in VIDEO_SUFFIXES
                takes_video = is_clip and self.recipe.defaults.source.takes_video
                values["video_path" if takes_video else key] = text
            else:
                values[key] = text
        return values

    @property
    def session_argv(self) -> list[str]:
        """Return the command that loads the model and then reads requests, which set the LoRA strengths."""
        recipe = self.recipe
        argv = ["python", recipe.script, *_as_argv({**recipe.fixed_options, **self._lora_options()})]
        return [*argv, "--interactive", find_flag("save_path", recipe.defaults), self.save_path]

    def request(self, seed: str) -> dict[str, Any]:
        """Return the request for one result, as `generation/json_requests.py` reads it."""
        options: dict[str, Any] = dict(self._line_values(seed))
        if self.references and "references" in self.recipe.fields:
            options["control_image_path"] = list(self.references)
        strengths = {}
        for expert in dict.fromkeys(lora.expert for lora in self.loras):
            strengths[expert] = self._lora_strengths(expert)
        return {"prompt": self.prompt.strip(), "options": options, "strengths": strengths}

    def command(self, seed: str) -> list[str]:
        """Return the generation command for this request and `seed`, as a user could type it."""
        recipe = self.recipe
        defaults = recipe.defaults
        options: dict[str, Any] = {**recipe.fixed_options, **self._lora_options()}
        for expert in ("", HIGH_NOISE):
            strengths = self._lora_strengths(expert)
            if any(float_or_one(strength) != 1 for strength in strengths):  # 1 is the scripts' default
                options[_with_expert(STRENGTHS, expert)] = strengths
        options["--prompt"] = self.prompt.strip()
        options |= to_command_options(self._line_values(seed), defaults)
        if self.references and "references" in recipe.fields:
            options[find_flag("control_image_path", defaults)] = list(self.references)
        save_flag = find_flag("save_path", defaults)
        return ["python", recipe.script, *_as_argv(options), save_flag, self.save_path]

    def as_render_job(self, seed: str) -> RenderJob:
        """Return the job that generates one result of this request with `seed`."""
        return RenderJob(
            id=0,
            title=self.recipe.title,
            session=self.session_argv,
            command=self.command(seed),
            request=self.request(seed),
            folder=str(self.recipe.folder),
            save_path=self.save_path,
            created=time.time(),
        )


def _as_argv(options: Mapping[str, Any]) -> list[str]:
    """Convert options by flag to command-line arguments. An option without values is a switch."""
    return option_argv({flag: True if value == [] else value for flag, value in options.items()})


def _with_expert(flag: str, expert: str) -> str:
    return f"{flag}_{expert}" if expert else flag


def float_or_one(text: str) -> float:
    """Parse a number; return 1.0 for any other text."""
    try:
        return float(text)
    except ValueError:
        return 1.0


def find_model_set(family: str, task: str) -> ModelSet | None:
    """Return the released model of a family and task if it can generate; None if there is none."""
    for model in model_sets():
        if (model.family, model.task) == (family, task) and "generate" in model.commands:
            return model
    return None
