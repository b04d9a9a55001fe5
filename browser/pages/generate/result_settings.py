"""Read the settings of a result from its file, and turn them back into the render job that generates it.

A file contains names of files without their folders. The model, the LoRAs and the embeddings of these names
are looked up among the runs and the released models; if none fits, no other file is used in its place.
"""

import functools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from browser.jobs.render_queue import RenderJob
from browser.runs.recipes import (
    FIELDS,
    IMAGES,
    LORA,
    SIDE_POSITIONS,
    STRENGTHS,
    ModelRecipe,
    RenderRequest,
    UsedLora,
    to_command_options,
)
from downloads.catalogue import model_title
from generation.prompt_lines import find_option, read_path
from modules.control_codes import shorten
from modules.installation import find_script
from modules.media.reading import TOOL_TAG, read_tags
from modules.option_tables import find_table
from modules.options import find_rejection
from modules.pages.language import join, refusal, say
from modules.table_parser import build_parser
from protocols.families import HIGH_NOISE, with_scripts

PREFIX = "bt_"
NOT_SET = "N/A"
# metadata that `ResultSettings.rows` shows in rows with translated names
MAIN_ROW_NAMES = {
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "video_length",
    "infer_steps",
    "guidance_scale",
    "embedded_cfg_scale",
    "seeds",
    "model_type",
    "task",
}
MAX_KEPT = 4000  # maximum characters of a text kept in lists
MAX_TAGS = 400  # maximum number of metadata entries that are read in a file
MAX_TYPED = 1 << 16  # characters of all strings of a render job
EMBEDDINGS = "textual_inversion_embeddings"
LORA_TAG = re.compile(rf"lora(?:_({HIGH_NOISE}))?_(\d{{1,3}})")
LORA_TEXT = re.compile(r"(.+): (\S+)", re.DOTALL)
# metadata that does not affect the pixels, or that is read elsewhere
EXCLUDED_METADATA = {
    "model_type",
    "tunerver",
    "prompt",
    "creation_timestamp",
    "device",
    "timestep_boundary",
    "task",
}
# keys of prompt lines that have another name in the metadata
PROMPT_LINE_KEYS = {"seeds": "seed", "width": "video_size_width", "height": "video_size_height"}
# options for input files; the metadata contains their file names
MEDIA_OPTIONS = {key for name in IMAGES for key in FIELDS[name]}
FILE_NAME = re.compile(
    r"[^\s/\\].*\.(safetensors|sft|pth?|bin|gguf|ckpt|png|jpe?g|webp|mp4|mkv|txt|json)", re.IGNORECASE
)
OPTION_PATTERN = re.compile(r"-(?!\.?\d)")  # looks like an option, not like a negative number
OLD_NAMES = {"hunyuan": "hunyuan_video"}  # old names of families in metadata


class NamedLora(NamedTuple):
    """A LoRA that a generated file's metadata names."""

    name: str  # name in its file
    strength: str
    expert: str  # "" or HIGH_NOISE

    @property
    def description(self) -> str:
        """Name, strength and expert, as translatable text."""
        return say(
            "%(name)s, strength %(strength)s%(expert)s",
            name=self.name,
            strength=self.strength,
            expert=f", {self.expert.replace('_', ' ')}" if self.expert else "",
        )


@dataclass(frozen=True)
class ResultSettings:
    """Settings with which this program generated a file, read from the file's metadata."""

    values: Mapping[str, str]  # metadata name without prefix -> text
    loras: Sequence[NamedLora]
    done: Sequence[str]  # later processing, such as `upscaler model=x.pth scale=2.0`

    def get(self, name: str) -> str:
        """Return the metadata value with this name; "" if there is none."""
        return self.values.get(name, "")

    @property
    def embeddings(self) -> list[str]:
        """File names of the embeddings. Raises OptionError if the names cannot be separated."""
        flag, text = f"--{EMBEDDINGS}", self.get(EMBEDDINGS)
        return [re.split(r"[\\/]", word)[-1] for word in _split_words(flag, text)]  # old files have paths

    @property
    def model(self) -> str:
        """Model type and task in one string."""
        return " ".join(filter(None, (self.get("model_type"), self.get("task"))))

    @property
    def title(self) -> str:
        """Display name of the model."""
        return say(model_title(self.get("model_type"), self.get("task")))

    @property
    def family(self) -> str:
        """Model family, by the name that scripts use; "" if it is unknown."""
        return find_family(self.get("model_type"))

    @property
    def summary(self) -> str:
        """Size, length, steps, guidance and seed in one line."""
        frames = self.get("video_length")
        guidance = self.get("embedded_cfg_scale") or self.get("guidance_scale")
        parts = [
            f"{self.get('width')} x {self.get('height')}" if self.get("width") else "",
            say("%(frames)s frames", frames=frames) if frames not in ("", "1") else "",
            say("%(steps)s steps", steps=self.get("infer_steps")) if self.get("infer_steps") else "",
            say("guidance %(guidance)s", guidance=guidance) if guidance else "",
            say("seed %(seed)s", seed=self.get("seeds")),
        ]
        return join(" · ", filter(None, parts))

    def rows(self) -> list[tuple[str, str]]:
        """Return the settings with which a file was generated as pairs (name, text), the main ones first."""
        size = f"{self.get('width')} x {self.get('height')}" if self.get("width") else ""
        main_values: dict[str, str] = {
            say("prompt"): self.get("prompt"),
            say("negative"): self.get("negative_prompt"),
            say("size"): size,
            say("frames"): self.get("video_length"),
            say("steps"): self.get("infer_steps"),
            say("guidance"): self.get("guidance_scale"),
            say("embedded guidance"): self.get("embedded_cfg_scale"),
            say("seed"): self.get("seeds"),
            say("model"): self.title,
        }
        rows = [(name, text) for name, text in main_values.items() if text]
        rows += [("LoRA", lora.description) for lora in self.loras]
        rows += [(say("afterwards"), text) for text in self.done]  # later processing, such as upscaling
        rows += [(name, text) for name, text in self.values.items() if name not in MAIN_ROW_NAMES]
        return rows

    def shortened(self) -> "ResultSettings":
        """Return the settings with long text shortened, because pages cache thousands of them."""
        values = {name: shorten(text, MAX_KEPT) for name, text in [*self.values.items()][:MAX_TAGS]}
        return replace(self, values=values, loras=self.loras[:99], done=[*self.done][:99])


def read_settings(path: Path) -> ResultSettings | None:
    """Return the settings in a generated file; None if another program wrote it, or it has no metadata.

    Raises MediaError or OSError if it cannot be read.
    """
    return parse_settings(read_tags(path))


def parse_settings(tags: Mapping[str, str]) -> ResultSettings | None:
    """Return the generation settings in the metadata of a file; None if this program wrote none."""
    settings = parse_tags(tags)
    is_ours = all(name in settings.values for name in ("prompt", "seeds", "model_type"))
    return settings if is_ours else None


def parse_tags(tags: Mapping[str, str]) -> ResultSettings:
    """Return the generation settings in metadata that `blissful_tuner/metadata.py` has written.

    `tags` contains the texts by metadata key.
    """
    values = {}
    loras: dict[tuple[str, int], NamedLora] = {}
    steps_by_number: dict[int, str] = {}
    for name, text in [*tags.items()][: 2 * MAX_TAGS]:  # limited, because the file may come from elsewhere
        tool_tag = TOOL_TAG.fullmatch(name)
        if tool_tag is not None:  # number and description of a later processing step
            steps_by_number[int(tool_tag[1])] = text
        if not name.startswith(PREFIX) or text == NOT_SET:
            continue
        name = name.removeprefix(PREFIX)
        lora_tag = LORA_TAG.fullmatch(name)  # expert and number
        lora_text = LORA_TEXT.fullmatch(text)  # name and strength
        if lora_tag is not None and lora_text is not None:
            expert = lora_tag[1] or ""
            loras[expert, int(lora_tag[2])] = NamedLora(lora_text[1], lora_text[2], expert)
        else:
            values[name] = text.replace("\\n", "\n")  # line breaks are escaped in one-line metadata
    return ResultSettings(
        values=values,
        loras=[loras[key] for key in sorted(loras)],
        done=[steps_by_number[number] for number in sorted(steps_by_number)],
    )


def find_family(model_type: str) -> str:
    """Return the family of a model type that a file's metadata names; "" if it is unknown."""
    model_type = OLD_NAMES.get(model_type, model_type)
    entries = with_scripts()
    plain = _plain_name(model_type)
    fitting = []
    for name, entry in entries.items():
        if model_type == name or model_type in entry.further_models:
            return name
        if plain.startswith(_plain_name(name)):
            fitting.append(name)
    return max(fitting, key=len, default="")


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class KnownOption(NamedTuple):
    """An option of a generation script: its flags, number of words and default, to write a command line."""

    flags: Sequence[str]
    nargs: Any  # as argparse defines it: 0 for a switch, None for one word
    default: Any
    is_recorded: bool  # recorded in the metadata unless it is the default


@functools.cache
def read_script_options(family: str) -> Mapping[str, KnownOption]:
    """Return the options of a family's generation script by name, except the ones that it rejects."""
    table = find_table(find_script(f"{with_scripts()[family].generation_script}.py"))
    assert table is not None, family
    options = {}
    for action in build_parser(table, "")._actions:  # argparse has no public list of a parser's options
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if flags and find_rejection(action) is None:
            # not recorded: what belongs to one request, changes no pixel, writes files or imports code
            facts = vars(action)
            record = facts["noted"].get("record") if "noted" in facts else "nothing"
            options[action.dest] = KnownOption(
                flags=flags,
                nargs=action.nargs,
                default=action.default,
                is_recorded=record not in ("request", "nothing") and not facts.get("reach"),
            )
    return options


FindFile = Callable[[str], str]  # returns the path of a file by its name; raises OptionError


def regenerate(
    settings: ResultSettings,
    recipe: ModelRecipe,
    seed: str,
    save_path: str,
    find_weights: Callable[[str, ModelRecipe], str],
    find_media: FindFile,
) -> RenderJob:
    """Return the render job that generates a result again from its settings with a recipe's model.

    1. Combine the fixed options of the recipe with the options in the metadata.
    2. Find the files of the LoRAs and embeddings.
    3. Make the request and the command of the render job. The prompt line sets the seed.

    Args:
        recipe: Recipe with the same model.
        save_path: File or folder of the new result.
        find_weights: Returns the path of a LoRA or an embedding by its name.
        find_media: Returns the path of an image or clip by its name.

    Raises:
        OptionError: If the recipe is for another model, or if a file is not found.
    """
    if sum(map(len, settings.values.values())) > MAX_TYPED:
        raise refusal("Its texts are too long to generate it again.")
    fixed_options = _make_fixed_options(settings, recipe)
    line_options = _make_prompt_line_options(settings, recipe, seed, find_media)
    loras = []
    for lora in settings.loras:
        # it comes from metadata, and must not be read as another option
        _reject_options(STRENGTHS, [lora.strength])
        path = find_weights(lora.name, recipe)
        if lora.expert:  # the command has separate options for the LoRAs of this expert
            fixed_options.setdefault(f"{LORA}_{lora.expert}", []).append(path)
            fixed_options.setdefault(f"{STRENGTHS}_{lora.expert}", []).append(lora.strength)
        else:
            loras.append(UsedLora(path, lora.strength))
    if settings.embeddings:
        fixed_options[f"--{EMBEDDINGS}"] = [find_weights(name, recipe) for name in settings.embeddings]
    render_request = RenderRequest(
        replace(recipe, fixed_options=fixed_options),
        prompt=settings.get("prompt"),
        texts={},
        loras=loras,
        save_path=save_path,
    )
    request = render_request.request("")  # `line_options` have the seed
    request["options"] = {**request["options"], **line_options}
    command = _make_command(render_request, line_options)
    return replace(render_request.as_render_job(""), request=request, command=command)


def _make_command(render_request: RenderRequest, line_options: Mapping[str, str | list[str]]) -> list[str]:
    """Return the command line of a request, with its prompt-line options as command-line options."""
    # It generates one result, even if the recipe's command generates several.
    recipe = render_request.recipe
    options = {**recipe.fixed_options, **to_command_options(line_options, recipe.defaults)}
    for flag in ("--num_videos", "--num_images"):
        options.pop(flag, None)
    return replace(render_request, recipe=replace(recipe, fixed_options=options)).command("")


def _make_fixed_options(settings: ResultSettings, recipe: ModelRecipe) -> dict[str, Any]:
    """Return the fixed options of a recipe, changed to the values in a result's metadata."""
    options = read_script_options(recipe.family)
    _check_task(settings, recipe, options)
    fixed_options = _select_recipe_options(settings, recipe, options)
    # an option may have several flags: the recipe's flag is kept
    option_names = {flag: name for name, option in options.items() for flag in option.flags}
    recipe_flags = {option_names[flag]: flag for flag in fixed_options if flag in option_names}
    for name, recorded_text in settings.values.items():
        option = options.get(name)
        if option is None or not _is_fixed(name, option, recipe):
            continue
        flag = recipe_flags.get(name, option.flags[0])
        recipe_words = fixed_options.get(flag, [str(option.default)])
        if not _is_equal(recipe_words, recorded_text):  # equal values keep the recipe's spelling
            _set_recorded_option(fixed_options, flag, option, recorded_text)
    return fixed_options


def _is_fixed(name: str, option: KnownOption, recipe: ModelRecipe) -> bool:
    """Return whether metadata `name` is the value of an option that all results of a command share."""
    # options of the prompt line are not fixed: each result may have other values
    is_line_option = name in PROMPT_LINE_KEYS or _is_line_option(name, recipe)
    is_read_elsewhere = _is_separate_metadata(name) or name == EMBEDDINGS
    return option.is_recorded and not is_line_option and not is_read_elsewhere


def _is_separate_metadata(name: str) -> bool:
    """Return whether metadata is read elsewhere, or does not affect the pixels."""
    return name in EXCLUDED_METADATA or name.startswith("original_")


def _select_recipe_options(
    settings: ResultSettings, recipe: ModelRecipe, options: Mapping[str, KnownOption]
) -> dict[str, Any]:
    """Return the fixed options of a recipe that a result may also have been generated with."""
    # These are the options that its metadata has, and those that metadata never has. LoRAs of experts are
    # taken from the metadata instead.
    option_names = {flag: name for name, option in options.items() for flag in option.flags}
    selected_options: dict[str, Any] = {}
    for flag, words in recipe.fixed_options.items():
        name = option_names.get(flag, "")
        is_expert_lora = name.startswith("lora_") and name.endswith(HIGH_NOISE)
        was_recorded = name in settings.values or name == "task"  # `_check_task` has compared the tasks
        if (was_recorded or _is_never_recorded(name, recipe, options)) and not is_expert_lora:
            selected_options[flag] = list(words) or True  # True: a switch, which has no values
    return selected_options


def _is_never_recorded(name: str, recipe: ModelRecipe, options: Mapping[str, KnownOption]) -> bool:
    """Return whether metadata does not tell if an option was used: no file records it, or a line set it."""
    option = options.get(name)
    return option is None or not option.is_recorded or _is_line_option(name, recipe)


def _set_recorded_option(fixed: dict[str, Any], flag: str, option: KnownOption, text: str) -> None:
    """Set an option in `fixed` to its value in a result's metadata, or remove a switch that was not used."""
    recipe_words = fixed.pop(flag, None)  # the recorded value replaces the recipe's
    recipe_names_file = isinstance(recipe_words, list) and _has_folder(recipe_words)
    if recipe_names_file or FILE_NAME.fullmatch(text) or _has_folder([text]):
        raise refusal("It was generated with %(text)s (%(flag)s).", text=shorten(text, 200), flag=flag)
    if text == "False":
        return
    if option.nargs == 0:  # a switch
        fixed[flag] = True
        return
    takes_one_word = option.nargs is None
    words = [text] if takes_one_word else _split_words(flag, text)
    _reject_options(flag, words)
    fixed[flag] = words


def _split_words(flag: str, text: str) -> list[str]:
    """Return the values of an option in metadata. Raises OptionError for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise refusal(
            "It was generated with %(text)s (%(flag)s): %(error)s.",
            text=shorten(text, 200),
            flag=flag,
            error=error,
        ) from None


def _reject_options(flag: str, words: Sequence[str]) -> None:
    """Raise OptionError if a value for `flag` in a file's metadata looks like another option."""
    for word in words:
        if OPTION_PATTERN.match(word):
            raise refusal(
                "It was generated with %(flag)s %(word)s, which looks like an option.",
                flag=flag,
                word=shorten(word, 200),
            )


def _check_task(settings: ResultSettings, recipe: ModelRecipe, options: Mapping[str, KnownOption]) -> None:
    """Raise OptionError if the recipe is for another family or task."""
    if settings.family != recipe.family:
        raise refusal("It was generated with %(title)s.", title=settings.title)
    task = settings.get("task")
    if task and "task" in options:
        task_words = recipe.fixed_options.get("--task", [str(options["task"].default)])
        if [*task_words] != [task]:
            raise refusal("It was generated with %(title)s.", title=settings.title)


def _is_line_option(name: str, recipe: ModelRecipe) -> bool:
    return find_option(name, recipe.defaults.line_options) is not None


def _is_equal(words: Sequence[str] | bool, text: str) -> bool:
    """Return whether an option's values equal its text in metadata, which drops folders from paths."""
    if isinstance(words, bool):
        return text == str(words)
    if shlex.join(words) == text or " ".join(words) == text:
        return True
    if len(words) != 1:
        return shlex.join(re.split(r"[\\/]", word)[-1] for word in words) == text
    if re.split(r"[\\/]", words[0])[-1] == text:
        return True
    try:
        return float(words[0]) == float(text)
    except ValueError:
        return False


def _has_folder(words: Sequence[str]) -> bool:
    return any("/" in word or "\\" in word for word in words)


def _make_prompt_line_options(
    settings: ResultSettings, recipe: ModelRecipe, seed: str, find_media: FindFile
) -> dict[str, str | list[str]]:
    """Return the prompt-line options that generate a result again with `seed`."""
    line_options: dict[str, str | list[str]] = {}
    for name, text in settings.values.items():
        key = PROMPT_LINE_KEYS.get(name, name)
        line_option = find_option(key, recipe.defaults.line_options)
        # other metadata is not an option, or an option that prompt lines cannot set
        if line_option is None or _is_separate_metadata(name) or not _needs_line(key, text, recipe):
            continue
        if key in MEDIA_OPTIONS or line_option.read is read_path:
            paths = [find_media(media_name) for media_name in text.split("\n")]
            line_options[key] = paths if line_option.repeats else paths[0]
        else:
            line_options[key] = text
    line_options["seed"] = seed
    return line_options


def _needs_line(key: str, text: str, recipe: ModelRecipe) -> bool:
    """Return whether a prompt line has to set an option: the width or height, or a value not set already."""
    if key in SIDE_POSITIONS:
        return True
    option = read_script_options(recipe.family).get(key)
    if option is None:
        return key in recipe.extra_options
    is_set_by_recipe = any(flag in recipe.fixed_options for flag in option.flags)
    return is_set_by_recipe or not _is_equal([str(option.default)], text)


# letters of an option in a prompt line -> metadata name, in the order in which `new` writes them
SAMPLE_OPTIONS = {
    "w": "width",
    "h": "height",
    "f": "video_length",
    "s": "infer_steps",
    "g": "guidance_scale",
    "l": "",  # applies only with embedded guidance
    "fs": "flow_shift",
    "n": "negative_prompt",
    "d": "seeds",
}


def format_sample_line(settings: ResultSettings) -> str:
    """Return the prompts.txt line that generates these settings. Raises OptionError if no line can."""
    prompt = " ".join(settings.get("prompt").split())
    values = {letters: " ".join(settings.get(name).split()) for letters, name in SAMPLE_OPTIONS.items()}
    guidance = settings.get("guidance_scale")
    embedded_guidance = settings.get("embedded_cfg_scale")
    # in prompt files, --g is the guidance that the model uses by default, and --l a CFG scale on top of it
    values["g"] = embedded_guidance or guidance
    values["l"] = guidance if embedded_guidance else ""
    if values["f"] == "1":  # an image: its prompt lines need no length
        values["f"] = ""
    _check_sample_line(settings, prompt, values["n"])
    options = [f"--{letters} {value}" for letters, value in values.items() if value]
    return " ".join([prompt, *options])


def _check_sample_line(settings: ResultSettings, prompt: str, negative_prompt: str) -> None:
    """Raise OptionError if a prompt line cannot express these values, such as a start image."""
    if " --" in f" {prompt}" or " --" in f" {negative_prompt}":
        raise refusal("Its text has two dashes after a space, which in a prompt line begin an option.")
    if prompt.startswith("#") or not prompt:
        raise refusal("A line that begins with # is not a prompt.")
    if any(settings.get(name) for name in MEDIA_OPTIONS):
        raise refusal("It started from an image, and the file contains only its name: add the image by hand.")
