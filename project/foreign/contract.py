"""Records that describe how to read a trainer's file: a rule for each key. No torch."""

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from downloads.naming import plain_name
from modules.option_values import split_pairs
from modules.output_files import check_output_name
from project.options import check_trigger

# target of a value: an option of `new`, a key of [training] in run.toml or of a table in dataset.toml, or
NEW, TRAINING, DATA = "new", "training", "data"
MODEL = "model"  # the name of a model, which is matched to a task
FILE = "file"  # the base model: a file, a folder, or the name of a released one
# another file; name: names of --model_file that it may be, or network_weights, separated by blanks
OWN_FILE = "own file"
ADAPTER = "adapter"  # a training adapter, which may be a published one
FOLDER = "folder"  # a folder with images or clips
SIZES = "sizes"  # sizes, at each of which a file is trained: resolution in dataset.toml
FRAMES = "frames"  # lengths of clips: target_frames in dataset.toml
EPOCHS = "epochs"  # epochs, converted to steps; name: precedence (below)
PER_EPOCH = "per epoch"  # an interval in epochs; name: the option in steps
SHARE = "share"  # the warm-up as a fraction of the run
NETWORK = "network"  # kind of network: a LoRA or another one
ARGUMENT = "argument"  # an argument of the optimizer; `name` is the argument's name
ARGUMENTS = "arguments"  # several arguments of the optimizer, as KEY=VALUE
NETWORK_ARGUMENT = "network argument"  # an argument of the network; `name` is its name
SAMPLE = "sample"  # part of a sample prompt, which `Program.read_samples` reads
KEPT = "kept"  # how many saved files are kept
OMITTED = "left"  # left out, with the reason in the rule

# precedence of EPOCHS: over a number of steps, below it, or the run ends at whichever comes first
FIRST, LAST, SOONEST = "first", "last", "soonest"
MAX_STEPS = 10_000_000
FULL_RANK = 1_000_000  # a LoKr of this rank has full matrices: no layer has half as many rows


class KeyRule(NamedTuple):
    """How a key of another trainer's file is handled; `read` converts its value or raises ValueError."""

    target: str
    name: str = ""  # name of the option or key; for OMITTED, the reason
    read: Callable[[Any], Any] = lambda value: value


class ForeignRun(NamedTuple):
    """The kind of training that another trainer's project sets up, and the key that determines it."""

    kind: str  # a value of `new --train`
    setting: str  # key and value that select it, for messages


class UnsetValue(ValueError):
    """A value that means "not set" in the other trainer's interface."""


class UnsupportedRun(Exception):
    """Raised if `new` cannot set up a project's kind of training; the message gives the reason."""


@dataclass(frozen=True)
class TrainedNetworks:
    """Which networks of a model another trainer's project trains, and at which learning rates."""

    file_keys: tuple[str, ...] = ()  # keys that select the networks
    trains_dit: bool = True  # the transformer or U-Net
    dit_rate: float | None = None  # None: the run's learning rate
    # learning rate of each text encoder; 0 freezes it; () if none is trained
    text_encoder_rates: tuple[float | None, ...] = ()

    @property
    def trains_text_encoders(self) -> bool:
        """Whether any text encoder is trained."""
        return any(rate != 0 for rate in self.text_encoder_rates)


def train_lora(values: Mapping[str, Any]) -> ForeignRun:
    """Return a LoRA run, for trainers whose project files train nothing else."""
    return ForeignRun("lora", "")


def train_default_networks(values: Mapping[str, Any]) -> TrainedNetworks:
    """Return the default networks, for trainers whose files cannot select which ones are trained."""
    return TrainedNetworks()


def find_no_ineffective_keys(values: Mapping[str, Any]) -> set[str]:
    """Return an empty set, for trainers in whose files every key has an effect."""
    return set()


def guess_no_model(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return None, for trainers whose files reveal the model only by the keys that name it."""
    return None


def read_no_samples(values: Mapping[str, Any]) -> list[Any]:
    """Return no samples, for trainers that make none."""
    return []


@dataclass(frozen=True)
class Program:
    """Another trainer, with the rules for reading its project files.

    Keys are dotted, with [] for list elements. A rule for `table.*` applies to the table's keys without a
    rule of their own. Keys without any rule are reported.
    """

    title: str
    suffixes: tuple[str, ...]
    identifying_keys: tuple[str, ...]  # keys that identify the program: each of its files has one
    rules: Mapping[str, KeyRule]
    model_by_name: Mapping[str, tuple[str, str | None]]  # the program's name of a model -> family and task
    default_alpha: float | None  # default alpha of a LoRA; None for its rank
    companion_keys: tuple[str, ...] = ()  # keys naming an additional file; its keys get the prefix KEY:
    # keys missing in a file -> the program's default, if `new` would choose another value
    default_values: Mapping[str, Any] = field(default_factory=dict)
    unit_keys: Mapping[str, str] = field(default_factory=dict)  # key of a number -> key of its unit
    shares_option_names: bool = False  # whether other keys are options of the training script
    find_run: Callable[[Mapping[str, Any]], ForeignRun] = train_lora  # raises UnsupportedRun
    find_trained_networks: Callable[[Mapping[str, Any]], TrainedNetworks] = train_default_networks
    # our name of an optimizer -> arguments that the program passes by default
    default_optimizer_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # returns the keys that have no effect in the program
    find_ineffective_keys: Callable[[Mapping[str, Any]], set[str]] = find_no_ineffective_keys
    # keys that exclude a dataset from training -> the values that do
    dataset_off_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # key and value that make repeats the number of files drawn per epoch
    fixed_draw_settings: Mapping[str, Any] = field(default_factory=dict)
    # whether an epoch has each file at one of several sizes, not at all of them
    draws_one_size: bool = False
    # keys with a variant of a model -> the key with the kind of model; `models` has both names, with
    # a space between them
    kind_key_by_variant: Mapping[str, str] = field(default_factory=dict)
    # guesses family and task from other keys if the file names no model
    guess_model: Callable[[Mapping[str, Any]], tuple[str, str] | None] = guess_no_model
    # returns the samples that the file asks for
    read_samples: Callable[[Mapping[str, Any]], list[Any]] = read_no_samples
    # renames values to the keys in `rules`, if the names depend on other values
    rename_keys: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values


def omitted(reason: str) -> KeyRule:
    """Return a rule that omits a key and gives the user this reason."""
    return KeyRule(OMITTED, reason)


def join_switch(
    values: dict[str, Any],
    switch: str,
    amount: str,
    *,
    default: float,
    on_values: Collection[str] = (),
    joined_key: str = "",
) -> dict[str, Any]:
    """Return the values with one key for a switch and the number that acts only if the switch is on.

    Args:
        values: Values of the file.
        switch: Key of the switch.
        amount: Key of the number.
        default: The program's default of the number.
        on_values: Values with which the switch is on; () for those that mean true.
        joined_key: The key of both; "" for `SWITCH, NUMBER`, without the table of the number.
    """
    value = values.get(switch)
    if not (value in on_values if on_values else is_on(value)):
        return values
    joined = {key: value for key, value in values.items() if key not in (switch, amount)}
    joined[joined_key or f"{switch}, {amount.rpartition('.')[2]}"] = values.get(amount, default)
    return joined


def is_on(value: Any) -> bool:
    """Return whether a value means true; some trainers write true as a string or a number."""
    return value is True or value == 1 or str(value).strip().lower() in {"true", "yes", "1"}


def is_off(value: Any) -> bool:
    """Return whether a value means "not set": empty string, empty list, false or none."""
    return (
        value is None or value is False or value == [] or str(value).strip().lower() in {"", "false", "none"}
    )


def read_rate(value: Any) -> float | None:
    """Return a learning rate as a number; None if the value is not a number."""
    try:
        return number(0, 1000)(value)
    except (ValueError, TypeError):
        return None


def number(minimum: float = 0, maximum: float = 1e9) -> Callable[[Any], float]:
    """Return a function that parses a number between `minimum` and `maximum`."""

    def read(value: Any) -> float:
        if isinstance(value, str):  # YAML reads 1e-4 as a string, and web forms send strings
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("it is not a number")
        if not minimum <= value <= maximum:
            raise ValueError(f"it has to be {minimum:.12g} to {maximum:.12g}")
        return value

    return read


def integer(minimum: int = 0, maximum: int = MAX_STEPS) -> Callable[[Any], int]:
    """Return a function that parses an integer between `minimum` and `maximum`."""
    read_number = number(minimum, maximum)

    def read(value: Any) -> int:
        found = read_number(value)
        if found != int(found):
            raise ValueError("it is not a whole number")
        return int(found)

    return read


def read_repeats(value: Any) -> int:
    """Return how often an epoch repeats each file: an integer of at least 1."""
    return max(round(number(0, 100_000)(value)), 1)


def read_warmup(value: Any) -> float:
    """Return the warm-up as a number of steps or, below 1, as a fraction of the run."""
    found = number(0, MAX_STEPS)(value)
    return found if found < 1 else int(found)


def read_switch(value: Any) -> bool:
    """Convert a value to a bool.

    Raises:
        ValueError: If the value means neither true nor false.
    """
    if not (isinstance(value, bool | int) or str(value).lower() in {"true", "false"}):
        raise ValueError("it is neither true nor false")
    return is_on(value)


def make_name_reader(table: Mapping[str, str], instead: str) -> Callable[[Any], str]:
    """Return a function that looks up a name in `table`, ignoring case and separators.

    It raises an error for other names; `instead`, at the end of the message, says what to do.
    """

    def read(value: Any) -> str:
        name = table.get(plain_name(str(value)))
        if name is None:
            raise ValueError(instead)
        return name

    return read


_EIGHT_BITS = ("adamw8bit", "adamw8bitkahan", "bnbadamw8bit", "aoadamw8bit", "use8bitadam")
_OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamwoptimi", "optimiadamw", "adamwbf16", "adamwtorch", "bnbadamw"), "adamw"),
    **dict.fromkeys(_EIGHT_BITS, "adamw8bit"),
    **dict.fromkeys(("pagedadamw8bit", "bnbadamw8bitpaged"), "pagedadamw8bit"),
    **dict.fromkeys(("lion8bit", "bnblion8bit"), "lion8bit"),
    **dict.fromkeys(("lion", "bnblion", "optimilion"), "lion"),
    **dict.fromkeys(("adamwschedulefree", "schedulefreeadamw"), "adamwschedulefree"),
    **dict.fromkeys(("sgdschedulefree", "schedulefreesgd"), "sgdschedulefree"),
    **{name: name for name in ("adafactor", "prodigy", "radamschedulefree", "sgd", "adam", "rmsprop")},
    **{name: name for name in ("adagrad", "automagic", "nadam", "radam")},
}
# our name of an optimizer -> arguments that it accepts here
_ADAM_ARGUMENTS = frozenset({"betas", "eps", "weight_decay", "amsgrad"})
OPTIMIZER_ARGUMENTS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("adamw", "adam"), _ADAM_ARGUMENTS),
    **dict.fromkeys(
        ("adamw8bit", "pagedadamw8bit"), _ADAM_ARGUMENTS | {"min_8bit_size", "percentile_clipping"}
    ),
    **dict.fromkeys(("lion", "lion8bit"), frozenset({"betas", "weight_decay"})),
    **dict.fromkeys(("nadam", "radam"), frozenset({"betas", "eps", "weight_decay"})),
    "adafactor": frozenset(
        {"eps", "clip_threshold", "decay_rate", "beta1", "weight_decay", "scale_parameter"}
        | {"relative_step", "warmup_init"}
    ),
    "prodigy": frozenset(
        {"betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup"}
        | {"d0", "d_coef", "growth_rate", "fsdp_in_use", "slice_p"}
    ),
    "automagic": frozenset({"min_lr", "max_lr", "lr_bump", "eps", "clip_threshold", "beta2", "weight_decay"}),
    "sgd": frozenset({"momentum", "dampening", "weight_decay", "nesterov"}),
    "rmsprop": frozenset({"alpha", "eps", "weight_decay", "momentum", "centered"}),
    "adagrad": frozenset({"lr_decay", "weight_decay", "initial_accumulator_value", "eps"}),
    **dict.fromkeys(("adamwschedulefree", "radamschedulefree"), _ADAM_ARGUMENTS - {"amsgrad"} | {"r"}),
    "sgdschedulefree": frozenset({"momentum", "weight_decay", "r"}),
}
_SCHEDULERS = {
    plain_name(name): name
    for name in ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
} | {"cosinewithhardrestarts": "cosine_with_restarts", "adafactor": "adafactor"}
read_optimizer = make_name_reader(
    _OPTIMIZERS, "choose one from docs/training.md: optimizer_type below [training]"
)
read_scheduler = make_name_reader(
    _SCHEDULERS, "choose one from docs/training.md: lr_scheduler below [training]"
)


def read_name(value: Any) -> str:
    """Return a LoRA's name: its file name without folder and suffix."""
    name = re.split(r"[/\\]", str(value).strip())[-1].removesuffix(".safetensors")
    if not name:
        raise ValueError("it is empty")
    check_output_name("--output_name", name)
    return name


def read_shift(value: Any) -> float:
    """Return the shift of the noise levels. Raises UnsetValue for 0 and 1, which mean none."""
    shift = number(0, 1000)(value)
    if shift in (0, 1):
        raise UnsetValue
    return shift


# After the name of a distribution of noise levels: a shift moves them. Programs have the shift in a key of
# its own; here it is another value of --timestep_sampling.
SHIFTED = "shifted"
_SIGMOID = ("sigmoid", "logit_normal")  # names of the same distribution: sigmoid of a normal one
_TIMESTEP_SAMPLINGS = {
    **{plain_name(name): "sigmoid" for name in _SIGMOID},
    **{plain_name(f"{name}, {SHIFTED}"): "shift" for name in _SIGMOID},
    **{plain_name(f"{name}, flux_shift"): "flux_shift" for name in _SIGMOID},
    **dict.fromkeys(("uniform", "linear"), "uniform"),
    "shiftedlogitnormal": "shifted_logit_normal",
}
read_timestep_sampling = make_name_reader(
    _TIMESTEP_SAMPLINGS, "no timestep_sampling is like it; that of the model's page stays"
)


def name_distribution(name: str, shift: Any) -> str:
    """Return the name of a distribution of noise levels, with SHIFTED if `shift` moves them."""
    is_shifted = read_rate(shift) not in (None, 0, 1)
    return f"{name}, {SHIFTED}" if is_shifted else name


def read_path(value: Any) -> str:
    """Return a path as text. Raises ValueError for anything else, such as a list of paths."""
    if not isinstance(value, str):
        raise ValueError("it is not the path of one file")
    return value


def read_trigger(value: Any) -> str:
    """Return a trigger word without the <> of an embedding placeholder."""
    word = str(value or "").strip()
    if re.fullmatch(r"<[^<>]+>", word):
        word = word[1:-1]
    if not word:
        raise ValueError("it is empty")
    check_trigger(word)
    return word


def read_side(value: Any) -> tuple[int, int]:
    """Parse (width, height) from a number, `512,512` or `512x768`."""
    parts = re.split(r"[,x]", value.lower()) if isinstance(value, str) else [value]
    sides = [integer(64, 8192)(part) for part in parts]
    if len(sides) > 2:
        raise ValueError("it is not a size: set resolution in dataset.toml")
    rounded = [side // 32 * 32 for side in sides]
    return rounded[0], rounded[-1]


def read_one_size(value: Any) -> tuple[tuple[int, int]]:
    """Parse the only size at which files are trained; see `read_side`."""
    return (read_side(value),)


def read_sizes(value: Any) -> tuple[tuple[int, int], ...]:
    """Return several sizes, the largest first, each given as a number, as `512x768` or as a list of sides."""
    if isinstance(value, str):
        items: list[Any] = list(value.split(","))
    else:
        items = value if isinstance(value, list) else [value]
    sizes = []
    for item in items:
        if isinstance(item, list):
            if len(item) not in {2, 3}:  # width, height and perhaps frames
                raise ValueError("it is not a size: set resolution in dataset.toml")
            item = f"{integer()(item[0])}x{integer()(item[1])}"  # as `read_side` takes it
        sizes.append(read_side(item))
    if not sizes:
        raise ValueError("it is empty")
    return join_sizes(sizes)


def join_sizes(sizes: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return sizes (width, height) once each, in descending order of their areas."""
    return tuple(sorted(set(sizes), key=lambda size: (-size[0] * size[1], size)))


def read_frames(value: Any) -> tuple[int, ...]:
    """Return the lengths of clips in frames, in ascending order: a number, or a list of numbers."""
    lengths = value if isinstance(value, list) else [value]
    if not lengths:
        raise ValueError("it is empty")
    return tuple(sorted({integer(1, 100_000)(length) for length in lengths}))


_NETWORKS: Mapping[str, str | None] = {  # spelling of a network -> module; None: a LoRA
    **dict.fromkeys(
        ("lora", "standard", "flux1", "locon", "kohyalocon", "lycorislocon", "lierla", "lorapeft")
    ),
    **dict.fromkeys(("loha", "lycorisloha"), "networks.loha"),
    **dict.fromkeys(("lokr", "lycorislokr"), "networks.lokr"),
}


def read_network(value: Any) -> str | None:
    """Return the network module for a network type name; None for the default LoRA."""
    kind = plain_name(str(value))
    if kind not in _NETWORKS:
        raise ValueError("a LoRA is trained. docs/networks.md has other networks")
    return _NETWORKS[kind]


def read_arguments(value: Any) -> dict[str, str]:
    """Parse optimizer arguments: KEY=VALUE pairs, separated by spaces or commas."""
    texts = value if isinstance(value, list) else re.split(r"\s+|,(?=\s*[A-Za-z_]\w*\s*=)", str(value))
    stripped = [str(text).strip("\"' ") for text in texts]
    return split_pairs("arguments of an optimizer", [text for text in stripped if text])


_LOSSES = {
    "mse": "l2",
    "mae": "l1",
    **{name: name for name in ("l1", "l2", "huber")},
    "smoothl1": "smooth_l1",
}
read_loss = make_name_reader(_LOSSES, "loss_type below [training] has l2, l1, huber and smooth_l1")


def read_text(value: Any) -> str:
    """Return a string without surrounding spaces.

    Raises:
        ValueError: If the value is not a string.
        UnsetValue: If the string is empty.
    """
    if not isinstance(value, str):
        raise ValueError("it is not text")
    if is_off(value):
        raise UnsetValue("it is empty")
    return value.strip()


def read_folder(value: Any) -> Path:
    """Convert a text to a path. Raises ValueError for other values, and UnsetValue for an empty text."""
    text = read_text(value)
    if "\0" in text:
        raise ValueError("a folder name cannot contain NUL")
    return Path(text)
