"""Lines of prompts, `a cat --n ugly --w 512 --d 1,2`, and where they come from: files, modules, ...

The grammar is that of the other scripts (generation/prompt_lines.py); letters and values are those of the
image guides. Keys are the names of the options on the command line, whose checks apply.
"""

import importlib.util
import logging
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, count
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

from generation import prompt_lines
from generation.prompt_lines import find_option_key
from modules.control_codes import replace_control_codes, shorten
from modules.errors import OptionError, UserError
from modules.installation import import_user_module, rejects_code
from modules.limits import MAX_VARIANTS
from modules.media.reading import folder_images, image_size, read_tags
from modules.option_values import parse_int
from modules.options import option_values
from modules.paths import MAX_NAME_BYTES
from stable_diffusion.options import GenImgOptions, ImageInputOptions
from stable_diffusion.sampling_options import read_unsharp

SEEDS = "seeds"
MULTIPLIERS = "network_mul"
SEED_BITS = 64
# maximum bytes of a name: "_0_1234.png" and the suffix of a temporary file are appended to it
LONGEST_NAME = MAX_NAME_BYTES - 35


def _read_seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(parse_int(part.strip()) for part in text.split(","))
    if not all(-(2**63) <= seed < 2**SEED_BITS for seed in seeds):
        raise ValueError("a seed has at most 64 bits")
    return seeds


def _read_numbers(text: str) -> tuple[float, ...]:
    return tuple(prompt_lines.read_number(part.strip()) for part in text.split(","))


def _or_none(read: Callable[[str], prompt_lines.Value]) -> Callable[[str], prompt_lines.Value]:
    return lambda text: None if text.lower() == "none" else read(text)


def _read_unsharp(text: str) -> str | None:
    if text.lower() == "none":
        return None
    try:
        read_unsharp("", text)
    except OptionError as error:
        raise ValueError(str(error).strip()) from None
    return text


LINE_OPTIONS: Mapping[str, prompt_lines.LineOption] = {
    "n": prompt_lines.LineOption("negative_prompt", str, prompt_lines.NO_TEXT),
    "w": prompt_lines.LineOption("W", parse_int),
    "h": prompt_lines.LineOption("H", parse_int),
    "s": prompt_lines.LineOption("steps", parse_int),
    "d": prompt_lines.LineOption(SEEDS, _read_seeds),
    "l": prompt_lines.LineOption("scale", prompt_lines.read_number),
    "nl": prompt_lines.LineOption("negative_scale", _or_none(prompt_lines.read_number)),
    "t": prompt_lines.LineOption("strength", prompt_lines.read_number),
    "am": prompt_lines.LineOption(MULTIPLIERS, _read_numbers),
    "c": prompt_lines.LineOption("clip_prompt", str, prompt_lines.NO_TEXT),
    "f": prompt_lines.LineOption("file_name", str, prompt_lines.NO_TEXT),
    "ow": prompt_lines.LineOption("original_width", parse_int),
    "oh": prompt_lines.LineOption("original_height", parse_int),
    "nw": prompt_lines.LineOption("original_width_negative", parse_int),
    "nh": prompt_lines.LineOption("original_height_negative", parse_int),
    "ct": prompt_lines.LineOption("crop_top", parse_int),
    "cl": prompt_lines.LineOption("crop_left", parse_int),
    "dsd1": prompt_lines.LineOption("ds_depth_1", _or_none(parse_int)),
    "dst1": prompt_lines.LineOption("ds_timesteps_1", parse_int),
    "dsd2": prompt_lines.LineOption("ds_depth_2", _or_none(parse_int)),
    "dst2": prompt_lines.LineOption("ds_timesteps_2", parse_int),
    "dsr": prompt_lines.LineOption("ds_ratio", prompt_lines.read_number),
    "glt": prompt_lines.LineOption("gradual_latent_timesteps", _or_none(parse_int)),
    "glr": prompt_lines.LineOption("gradual_latent_ratio", prompt_lines.read_number),
    "gls": prompt_lines.LineOption("gradual_latent_ratio_step", prompt_lines.read_number),
    "gle": prompt_lines.LineOption("gradual_latent_every_n_steps", parse_int),
    "glsn": prompt_lines.LineOption("gradual_latent_s_noise", prompt_lines.read_number),
    "glus": prompt_lines.LineOption("gradual_latent_unsharp_params", _read_unsharp),
}

# option names in prompt lines of the other scripts -> names here
_LONG_NAMES = {
    "video_size_width": LINE_OPTIONS["w"],
    "video_size_height": LINE_OPTIONS["h"],
    "infer_steps": LINE_OPTIONS["s"],
    "seed": LINE_OPTIONS["d"],
    "guidance_scale": LINE_OPTIONS["l"],
    "negative_prompt": LINE_OPTIONS["n"],
}


def find_option(word: str) -> prompt_lines.LineOption | None:
    """Find a prompt-line option by its letters (case-insensitive), key or long name; None if unknown."""
    by_key = {option.key: option for option in LINE_OPTIONS.values()}
    option = LINE_OPTIONS.get(word.lower()) or by_key.get(word)
    if option is not None:
        return option
    key = find_option_key(word, _LONG_NAMES)
    return None if key is None else _LONG_NAMES[key]


def read_line(line: str, where: str = "the prompt") -> dict[str, Any]:
    """Read a prompt line into `prompt` and its options by key; unknown options are ignored with a warning.

    Args:
        line: The prompt line.
        where: Name of the line in warnings.

    Raises:
        OptionError: If a value cannot be read, or if --f is not a valid file name on every system.
    """
    values = prompt_lines.parse_option_line(line, LINE_OPTIONS, where, find_option)
    file_name = values.get("file_name")
    if file_name is not None:
        # Raise OptionError unless the value of --f is a valid file name on every system
        quoted_name = repr(shorten(file_name, 80))
        is_path = not file_name or set(file_name) & set('/\\:*?"<>|') or set(file_name) <= {".", " "}
        if is_path or replace_control_codes(file_name) != file_name:
            raise OptionError(
                f"--f {quoted_name}: pass a file's name, without folders and characters that some systems do "
                "not take. Images are written to --outdir"
            )
        size = len(file_name.encode("utf-8", "replace"))
        if size > LONGEST_NAME:
            raise OptionError(
                f"--f {quoted_name}: the name has {size} bytes, but at most {LONGEST_NAME} are possible in "
                "addition to the number and the suffix. Use a shorter one"
            )
    return values


def read_line_seeds(line: str) -> tuple[int, ...] | None:
    """Return the seeds in the --d option of a prompt line; None without it.

    They are needed before variants of `{a|b}` groups are chosen, so `read_line` would be too late.

    Raises:
        OptionError: If the seeds cannot be parsed.
    """
    for typed_option in prompt_lines.split_line(line).options:
        name, _, value = typed_option.partition(" ")
        if find_option(name) is LINE_OPTIONS["d"]:
            try:
                return _read_seeds(value.strip())
            except ValueError as error:
                raise OptionError(f"--d: {error}") from None
    return None


# Dynamic prompts: `a {red|green} cat`, where one variant is chosen for each image.
#
# {a|b|c}             one of them
# {2$$a|b|c}          two of them, joined by ", ", in the order in which they are written
# {1-2$$a|b|c}        one or two of them; {-2$$...} none to two, {2-$$...} two to all
# {2$$ and $$a|b|c}   joined by " and "
# {e$$a|b}            one image for each choice; {e$$2$$a|b|c}: one for each pair
# \{ and \}           literal braces
#
# Groups may be nested: the innermost are replaced first.
JOINER = ", "
_GROUP = re.compile(r"(?<!\\)\{((?:[^{}\\]|\\.)*)\}", re.DOTALL)
_COUNTS = re.compile(r"(?:(\d{1,9})|(\d{0,9})-(\d{0,9}))\$\$(?:((?:(?!\$\$)[^|])*)\$\$)?")
_EACH = re.compile(r"[eE]\$\$")  # three characters, see `enumerates`


def enumerates(text: str) -> bool:
    """Return whether a prompt contains an `{e$$...}` group, which generates one image per choice."""
    return any(_EACH.match(group[1]) for group in re.finditer(r"(?<!\\)\{([^{}]{1,3})", text))


def expand(text: str, random: Random) -> list[str]:
    """Return a prompt's variants: `{e$$...}` groups give each choice in turn, others random choices.

    The result has one text, or several if there are `{e$$...}` groups. For each of these texts `random`
    starts from the same state. Equal texts are returned once.

    Raises:
        OptionError: If there are more than MAX_VARIANTS texts.
    """
    variants: list[str] = []
    for number, variant in enumerate(_expand_groups(text, random), 1):
        variants.append(re.sub(r"\\([{}])", r"\1", variant))  # \{ and \} are literal braces
        if number > MAX_VARIANTS:
            raise OptionError(f"{text[:60]!r} has more than {MAX_VARIANTS:,} variants. Omit some")
    return list(dict.fromkeys(variants))


class _ChoiceGroup(NamedTuple):
    """A variant group in a prompt: its choices, how many of them to take, and the separator."""

    choices: Sequence[str]
    minimum: int
    maximum: int
    separator: str


def _expand_groups(text: str, random: Random) -> Iterator[str]:
    """Yield a prompt with choices in place of its `{a|b}` groups."""
    # 1. Replace the first innermost group by choices drawn from `random`, and repeat until no group is left.
    # 2. At an `{e$$...}` group, continue separately with every combination of its choices.
    # 3. Later groups draw the same choices in each of these prompts.
    while (match := _GROUP.search(text)) is not None:
        before = text[: match.start()]
        after = text[match.end() :]
        content = match[1]
        enumeration = _EACH.match(content)
        if enumeration is not None:
            group = _read_group(content[enumeration.end() :])
            state = random.getstate()
            for size in range(group.minimum, group.maximum + 1):
                for chosen in combinations(group.choices, size):
                    random.setstate(state)
                    yield from _expand_groups(before + group.separator.join(chosen) + after, random)
            return
        group = _read_group(content)
        size = random.randint(group.minimum, group.maximum)
        # chosen variants stay in the order of the prompt
        indices = sorted(random.sample(range(len(group.choices)), size))
        text = before + group.separator.join(group.choices[index] for index in indices) + after
    yield text


def _read_group(content: str) -> _ChoiceGroup:
    """Parse the content of a variant group (`{...}`) in a prompt."""
    counts = _COUNTS.match(content)
    if counts is None:
        return _ChoiceGroup(content.split("|"), minimum=1, maximum=1, separator=JOINER)
    choices = content[counts.end() :].split("|")
    exact, low, high, separator = counts.groups()
    if exact is not None:
        low = high = exact
    minimum = min(int(low or "0"), len(choices))
    maximum = min(int(high or len(choices)), len(choices))
    if minimum > maximum:
        minimum, maximum = maximum, minimum
    return _ChoiceGroup(choices, minimum, maximum, JOINER if separator is None else separator)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Paths of a run's input images, masks and guide images, each in the order of use."""

    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    guides: tuple[Path, ...] = ()
    guides_per_image: int = 1  # number of guides of each image: one for each ControlNet

    def image(self, number: int) -> Path | None:
        """Return the input image for output `number`, counted from 0; files are reused in turn."""
        return _in_turn(self.images, number)

    def mask(self, number: int) -> Path | None:
        """Return the mask for output `number`; files are reused in turn. None without masks."""
        return _in_turn(self.masks, number)

    def select_guides(self, number: int) -> tuple[Path, ...]:
        """Return the guide images for output `number`: one per ControlNet, or a single one for all."""
        if len(self.guides) <= 1:
            return self.guides
        # guides come in groups, one guide per ControlNet; images use the groups in turn
        first = number % (len(self.guides) // self.guides_per_image) * self.guides_per_image
        return self.guides[first : first + self.guides_per_image]


def find_inputs(options: ImageInputOptions, num_control_nets: int) -> Inputs:
    """List the input images of a run, and read their headers.

    Args:
        options: Options of input images.
        num_control_nets: Number of ControlNets; each takes one guide per image.

    Raises:
        OptionError: If a file is missing, or the number of guides is neither 1 nor a multiple of
            `num_control_nets`.
        MediaError: If a file is not an image.
    """
    guides = [_list_images(path) for path in options.guide_image_path or ()]
    inputs = Inputs(
        images=_list_images(options.image_path),
        masks=_list_images(options.mask_path),
        guides=tuple(chain.from_iterable(guides)),
        guides_per_image=max(num_control_nets, 1),
    )
    # a single guide serves all ControlNets and images
    if len(inputs.guides) > 1 and len(inputs.guides) % inputs.guides_per_image:
        raise OptionError(
            f"--guide_image_path: {len(inputs.guides)} images for {num_control_nets} ControlNets. Pass "
            "one for each ControlNet, in their order, for the first image, then for the next one and so "
            "on, or a single one for all"
        )
    return inputs


def _list_images(path: Path | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    paths = folder_images(path) if path.is_dir() else [path]
    for image in paths:
        image_size(image)
    return tuple(paths)


def _in_turn(paths: Sequence[Path], number: int) -> Path | None:
    return paths[number % len(paths)] if paths else None


@dataclass(frozen=True)
class Line:
    """A prompt line from the user, including the options in it."""

    label: str  # in messages: "line 3"
    text: str
    # from an input image's metadata, instead of options in the text; such a prompt has no variants
    negative_prompt: str | None = None
    image_number: int | None = None  # the input image that the line belongs to; None for the next one
    num_images: int | None = None  # number of images to generate; None for the number in the options

    @property
    def is_from_metadata(self) -> bool:
        """Whether the prompt comes from image metadata; options and variants in it are not parsed."""
        return self.image_number is not None


def list_lines(options: GenImgOptions, inputs: Inputs) -> list[Line]:
    """Return a run's prompt lines from --from_file, --prompt or the metadata of its input images.

    Raises:
        OptionError: If there are no lines.
        MediaError: If an input image cannot be read.
    """
    prompts = options.prompts
    if prompts.from_file is not None:
        return [
            Line(f"line {index}", line.strip())
            for index, line in prompt_lines.read_generation_lines(prompts.from_file)
        ]
    if prompts.prompt is not None:
        return [Line("the prompt", prompts.prompt)]
    lines = []
    for index, path in enumerate(inputs.images):
        metadata = read_tags(path)
        if "prompt" in metadata:
            negative = metadata.get("negative-prompt", "")
            lines.append(Line(path.name, metadata["prompt"], negative, image_number=index))
        else:
            logger.warning("%s is skipped because its metadata contains no prompt", path)
    if not lines:
        raise OptionError(
            "There is no prompt, and the images of --image_path have none in their metadata. Pass --prompt "
            "or --from_file"
        )
    return lines


def import_prompter(name: str) -> ModuleType:
    """Import the module of `--from_module`: an import path, or a .py file.

    The working folder is searched too. The code in the module runs, because the user asked for it.

    Raises:
        OptionError: If the module cannot be imported or has no get_prompter.
    """
    if name.endswith(".py"):
        reason = rejects_code()  # with `run` and the queue, names come from other people's files
        if reason is not None:
            raise OptionError(f"--from_module {name}: {reason}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the module may run arbitrary code
            why = f"{type(error).__name__}: {error}. Fix it, or use --from_file"
            raise OptionError(f"--from_module {name} cannot be imported: {why}") from error
    else:
        remedy = " Fix it, or use --from_file"
        module = import_user_module("--from_module", name, "package.module, or FILE.py", remedy)
    if not callable(getattr(module, "get_prompter", None)):
        raise OptionError(
            f"--from_module {name} has no function get_prompter(args, pipe, networks). Use another module"
        )
    return module


def module_lines(
    module: ModuleType,
    options: GenImgOptions,
    pipe: Any,
    networks: Any,
    random: Random,
    count_images: Callable[[], int],
) -> Callable[[int | None], Iterator[Line]]:
    """Call a module's get_prompter(args, pipe, networks); return the function that yields a round's lines.

    The returned function takes the round's seed (--iter_same_seed) and ends when the prompter returns None.
    If the prompter returns a list of one prompt, --images_per_prompt images are generated from it, otherwise
    one image from each prompt.

    Args:
        module: The module.
        options: Options of the run; `args` has all of them as attributes.
        pipe: The loaded `contract.Model`, whose `unet`, `vae` and `text_encoders` are the networks.
        networks: `loras.AdjustableLoras`, or None.
        random: Draws seeds.
        count_images: Returns the number of images so far in the round.

    Raises:
        UserError: If the module fails; the returned function raises it too.
    """
    args = Namespace(**option_values(options))
    name = f"--from_module {options.prompts.from_module}"
    try:
        prompter = module.get_prompter(args, pipe, networks)
    except Exception as error:  # the module may run arbitrary code
        raise _prompter_error(f"{name}: get_prompter", error) from error
    if not callable(prompter):
        raise UserError(f"{name}: get_prompter returned no function. Fix the module")

    def yield_lines(round_seed: int | None) -> Iterator[Line]:
        return _yield_prompts(
            lambda index: prompter(args, pipe, random, round_seed, index, count_images()), name
        )

    return yield_lines


def _yield_prompts(call_prompter: Callable[[int], Any], name: str) -> Iterator[Line]:
    """Yield the prompts that a user's prompter returns, call by call, until it returns None."""
    number = 0
    for index in count():
        try:
            prompts = call_prompter(index)
        except Exception as error:  # the module may run arbitrary code
            raise _prompter_error(f"{name}: the prompter", error) from error
        if prompts is None:
            return
        # a string is a sequence of strings too: only lists and tuples are accepted
        is_list = isinstance(prompts, (list, tuple))
        if not is_list or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                f"{name}: the prompter returned {type(prompts).__name__}. Make it return a list of "
                "texts, or None at the end"
            )
        # a single prompt is repeated --images_per_prompt times, several are used once each
        for text in prompts:
            number += 1
            yield Line(f"prompt {number}", text, num_images=1 if len(prompts) > 1 else None)


def _prompter_error(subject: str, error: Exception) -> UserError:
    return UserError(f"{subject} failed: {type(error).__name__}: {error}. Fix the module")
