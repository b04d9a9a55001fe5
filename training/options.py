"""Compose the options that training has in every family; read them from command line and --config_file."""

import argparse
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dataset.options import CachingInRunOptions
from dataset.subset_options import SubsetOptions
from modules.command import name_as_typed
from modules.errors import OptionError
from modules.installation import FROM_QUEUE
from modules.option_values import option_argv, require, value_argv
from modules.options import (
    CONFIGURES,
    FREE,
    HABIT,
    NOT_COMPARED,
    ON_HARDWARE,
    SENDS,
    Options,
    list_idle,
    option,
    option_values,
    read_options,
)
from modules.parser import Parser, add_options, reject_unsupported, typed_names
from modules.run_limits import is_limited
from modules.script_options import read_command_line
from modules.table_answers import CommandLine
from networks.kinds.composing import RANKED_NETWORKS
from networks.options import NOTHING_FROZEN, FrozenModelOptions, NetworkOptions
from runtime.options import TrainingSpeedOptions
from training import learning_options, noise_options, run_options
from training.config_options import (
    ConfigOptions,
    check_imports,
    read_config_file,
)
from training.features.composing import join_run, options_at, rejected_for_full
from training.features.contract import (
    AT_ENDING,
    AT_LOGS,
    AT_LOSS,
    AT_METADATA,
    AT_NETWORK,
    AT_NOISE,
    AT_WEIGHTS,
)
from training.features.hooks import RunFeatures
from training.saving.options import MetadataOptions, SavingOptions

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Options)
T = TypeVar("T")

# near the width of the largest models; there a LoRA is larger than the weights that it changes
MAX_RANK = 4096

if TYPE_CHECKING:  # classes with the options of all features, built from the list of features
    OptionsAtNetwork = Options
    OptionsAtNoise = Options
    OptionsAtLoss = Options
    OptionsAtWeights = Options
    OptionsAtLogs = Options
    OptionsAtEnding = Options
    OptionsAtMetadata = Options
else:
    OptionsAtNetwork = options_at(AT_NETWORK)
    OptionsAtNoise = options_at(AT_NOISE)
    OptionsAtLoss = options_at(AT_LOSS)
    OptionsAtWeights = options_at(AT_WEIGHTS)
    OptionsAtLogs = options_at(AT_LOGS)
    OptionsAtEnding = options_at(AT_ENDING)
    OptionsAtMetadata = options_at(AT_METADATA)

NOT_AT_NETWORK = OptionsAtNetwork()  # defaults, if no network is trained


class TrainedNetworkOptions(NetworkOptions, title="network"):
    """Options of a trained network, including options of features that extend it."""

    at_network: OptionsAtNetwork


class TrainingOptions(Options, must_give=True):
    """All training options except the model family's own options."""

    loop: run_options.LoopOptions = option(facts=FREE)
    validation: run_options.ValidationOptions = option(facts=FREE)
    optimizer: learning_options.OptimizerOptions
    lr_schedule: learning_options.LrScheduleOptions = option(facts=HABIT)
    timesteps: noise_options.TimestepOptions = option(facts=HABIT)
    at_noise: OptionsAtNoise  # of features
    loss: noise_options.LossOptions = option(facts=HABIT)
    at_loss: OptionsAtLoss  # of features
    # None: the output is the velocity
    prediction: noise_options.PredictionOptions | None = option(facts=HABIT)
    # exactly one of these two is set: a network is added to the DiT and trained, or the DiT itself is trained
    network: TrainedNetworkOptions | None
    full_dit: learning_options.FullDitOptions | None
    accelerator: run_options.AcceleratorOptions = option(facts={**HABIT, **ON_HARDWARE})
    saving: SavingOptions = option(facts=FREE)
    samples: run_options.SampleOptions = option(facts=FREE)
    at_weights: OptionsAtWeights  # of features
    at_logs: OptionsAtLogs  # of features
    logs: run_options.LogOptions = option(facts=FREE)
    at_ending: OptionsAtEnding  # of features
    metadata: MetadataOptions = option(facts=FREE)
    at_metadata: OptionsAtMetadata  # of features
    speed: TrainingSpeedOptions = option(facts=ON_HARDWARE)
    # None: the script's models have one transformer
    experts: learning_options.ExpertTrainingOptions | None = option(facts=FREE)
    # only for image trainers that train LoRAs; None for other scripts
    lora_parts: learning_options.PartsOptions | None
    start: run_options.StartOptions | None = option(facts=FREE)
    subset: SubsetOptions | None = option(facts=FREE)  # the resulting tables are compared instead
    # no option: see `name_as_typed`
    typed_names: Mapping[str, str] = option(default={}, facts={**FREE, **NOT_COMPARED})
    # no option: names of all options on the command line, even those with their default value
    typed_options: frozenset[str] = option(default=frozenset(), facts={**FREE, **NOT_COMPARED})
    caching: CachingInRunOptions | None = option(facts=FREE)

    def __post_init__(self) -> None:
        """Raise OptionError if options conflict with each other, or if the run lacks data or a folder."""
        if self.full_dit is not None:
            self._check_full_dit(self.full_dit)
        rank = None if self.network is None else self.network.network_dim
        if rank is not None and rank > MAX_RANK:
            # Raise OptionError for a rank above MAX_RANK, unless it is of a module without ranks
            module = None if self.network is None else self.network.network_module
            if module is None or module.startswith(RANKED_NETWORKS):
                raise OptionError(
                    f"--network_dim {rank}: {MAX_RANK} is the maximum. Usual ranks are 4 to 128."
                )
        if self.is_fused:
            # Raise OptionError for options that need gradients after the backward pass
            accumulation = self.loop.gradient_accumulation_steps
            if accumulation != 1:
                raise OptionError(
                    f"--fused_backward_pass with --gradient_accumulation_steps {accumulation}: gradients are "
                    "freed in each backward pass, so there are none to accumulate. Use 1, or a larger "
                    "batch_size in --dataset_config"
                )
            if self.accelerator.mixed_precision == "fp16":
                raise OptionError(
                    "--fused_backward_pass with --mixed_precision fp16: whether fp16's scaled gradients "
                    "overflowed is known only after the whole backward pass. Use bf16 or no"
                )
            if self.network is not None and "ggpo_sigma" in self.network.arguments():
                raise OptionError(
                    "--fused_backward_pass with --network_args ggpo_sigma: LoRA-GGPO needs the gradients "
                    "that are freed at once. Omit one of the two"
                )
        # `features` raises OptionError if features do not fit the options; one that only shows something
        # needs no data and no folder
        if self.features.show is not None:
            return
        is_data_made = self.features.make_data is not None
        subset_has_data = self.subset is not None and self.subset.replaces_toml
        if not (is_data_made or subset_has_data):
            require(self.loop.dataset_config, "--dataset_config", "a TOML file that describes the data sets")
        if not self.exits_before_training:
            _ = self.saving.folder_and_name  # raises OptionError if the folder or the name is missing

    def of(self, kind: type[T]) -> T:
        """Return the options of a feature, given their class."""
        at_network = NOT_AT_NETWORK if self.network is None else self.network.at_network
        places: tuple[Options, ...] = (
            at_network,
            self.at_noise,
            self.at_loss,
            self.at_weights,
            self.at_logs,
            self.at_ending,
            self.at_metadata,
        )
        records = (getattr(place, field.name) for place in places for field in fields(place))
        return next(record for record in records if type(record) is kind)

    @functools.cached_property
    def features(self) -> RunFeatures:
        """Return what the active features add to a run, computed only from the options.

        Raises OptionError if a feature rejects the run. The `on.start` functions of this object are never
        called; `begin_run` in `features/composing.py` makes an object for the run itself.
        """
        return join_run(self)

    @property
    def exits_before_training(self) -> bool:
        """Whether the command shows something and exits before training, as with --check or --plan."""
        shows_images = self.subset is not None and self.subset.debug_dataset
        is_shown = self.features.show is not None or shows_images
        return is_shown or self.loop.check or self.speed.plan.is_planning

    @property
    def by_expert(self) -> learning_options.ExpertTrainingOptions:
        """Options of the two experts; for families of one DiT, a record with defaults."""
        return self.experts or learning_options.ONE_DIT

    @property
    def frozen(self) -> FrozenModelOptions:
        """Options of the frozen model under a LoRA; defaults if the model itself is trained."""
        return NOTHING_FROZEN if self.network is None else self.network.frozen

    @property
    def is_for_images(self) -> bool:
        """Whether the script trains an image model: only these scripts have --model_prediction_type."""
        return self.prediction is not None

    @property
    def can_swap(self) -> bool:
        """Whether blocks can be swapped: the DiT is frozen, and its weights are not sharded."""
        return self.full_dit is None and not self.speed.modes.splits_weights

    @property
    def is_fused(self) -> bool:
        """Whether weights are stepped inside the backward pass (--fused_backward_pass)."""
        records = (self.full_dit, self.lora_parts)
        return any(options is not None and options.fused_backward_pass for options in records)

    @property
    def predicted(self) -> str:
        """Quantity that the loss compares: --model_prediction_type, or raw for video models."""
        return noise_options.RAW if self.prediction is None else self.prediction.model_prediction_type

    @property
    def weighted_by(self) -> str:
        """Rule for weighting the loss by noise level, one of the names in `training.noise_options`."""
        return noise_options.TIMESTEP if self.prediction is None else self.prediction.weighted_by

    def _check_full_dit(self, options: learning_options.FullDitOptions) -> None:
        """Raise OptionError for options that full fine-tuning does not support."""
        precision = self.accelerator.mixed_precision
        if options.full_bf16 and precision != "bf16":
            raise OptionError(
                f"--full_bf16 with --mixed_precision {precision}: the model then computes in bf16; use bf16 "
                "for both"
            )
        # some multi-GPU modes do not support full fine-tuning
        for reject_full in self.speed.modes.hooks.check_full_training:
            reject_full(precision)
        quantization = self.speed.fp8.quantization
        if quantization is not None:
            flags = "--fp8_base" if self.speed.fp8.fp8_base else quantization.option_name
            raise OptionError(
                f"{flags}: trained weights are kept in float32, or in bfloat16 with --full_bf16, because "
                f"{quantization.form} would lose the steps; omit it, or train a LoRA"
            )
        if options.offloads_states and precision == "fp16":
            raise OptionError(
                "--offload_optimizer_device with --mixed_precision fp16: weights are stepped one by one, and "
                "whether fp16's scaled gradients overflowed concerns all of them. Use bf16 or no"
            )
        self.speed.swap.reject_trained(options.fused_backward_pass)


# options that `accelerate launch` sets by environment variables
LAUNCHER_VARIABLE_BY_OPTION = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
}


class ScriptOption(NamedTuple):
    """An option of a run: its name, its value, and the arguments that set it on a command line."""

    name: str
    text: str
    arguments: Sequence[str]  # flag and value; the flag as it was typed
    is_changed: bool  # it differs from its default
    is_typed: bool = True  # False: its value follows from other options


def list_script_options(parser: argparse.ArgumentParser, *records: Options) -> list[ScriptOption]:
    """Return the options that a parser has read, in order, without secrets such as API keys and tokens."""
    values: dict[str, Any] = {}
    for record in records:
        values |= option_values(record)
    typed_flags = parser.typed_flags if isinstance(parser, Parser) else {}
    return [
        _describe_option(action, values[action.dest], typed_flags)
        for action in parser._actions
        if action.dest in values and not vars(action).get("is_secret") and action.option_strings
    ]


def _describe_option(action: argparse.Action, value: Any, typed_flags: Mapping[str, str]) -> ScriptOption:
    """Return an option with its value, as words of a command, and whether it was changed or typed."""
    # the value when the option is not given: its default, or one taken from another option (`not_given`)
    default = getattr(action, "not_given", action.default)
    texts = value_argv(value)
    are_numbers = isinstance(value, (int, float)) and isinstance(default, (int, float))
    is_changed = value != default if are_numbers else texts != value_argv(default)
    flags = [flag for flag in action.option_strings if flag.startswith("--")]
    by_preference = (typed_flags.get(action.dest), f"--{action.dest}", flags[0])
    flag = next(flag for flag in by_preference if flag in flags)
    is_switch = action.nargs == 0 or not texts
    # changed, but neither typed nor set by the launcher: the value was derived from other options
    is_derived = (
        is_changed and typed_flags and action.dest not in {*typed_flags, *LAUNCHER_VARIABLE_BY_OPTION}
    )
    return ScriptOption(
        name=action.dest,
        text=" ".join(texts),
        arguments=option_argv({flag: True if is_switch else value}),
        is_changed=is_changed,
        is_typed=not is_derived,
    )


@dataclass(frozen=True)
class TrainerChanges:
    """How a script changes shared options: defaults, choices, rejections, and other names for them."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    # copies values of the family's own option names to the shared options, before records are read
    translate: Callable[[argparse.Namespace], None] = lambda args: None


NO_CHANGES = TrainerChanges()


def read_training(
    doc: str | None,
    record: type[R],
    argv: Sequence[str] | None,
    trained_options: type[Options] = TrainedNetworkOptions,
    shared: Sequence[type[Options]] = (),
    changes: TrainerChanges = NO_CHANGES,
) -> tuple[TrainingOptions, R, list[ScriptOption]]:
    """Read the shared options and the family's options of a training script.

    Args:
        doc: The script's docstring.
        record: Class of the family's own options.
        argv: Command line; None for `sys.argv`.
        trained_options: Record with the options of what is trained: a network, or a whole DiT.
        shared: More records of shared options.
        changes: Changes of shared options by the script.

    Returns:
        Shared options, the family's options, and a list of both with their command-line arguments.
    """

    def build_parser() -> Parser:
        parser = training_parser(
            doc,
            trained_options,
            defaults=changes.defaults,
            settings=changes.settings,
            refused=changes.refused,
        )
        add_options(parser, record, *shared, refused=changes.refused)
        return parser

    command = read_command_line(argv, build_parser)
    args = fill_arguments(command)
    changes.translate(args)
    with name_as_typed(typed_names(args)):
        options = read_options(TrainingOptions, args)
        family_options = read_options(record, args)
        if args.options_of_file:
            log_options_without_effect(args, options, family_options)
    return options, family_options, list_script_options(command.parser, family_options, options)


def log_options_without_effect(args: argparse.Namespace, *records: Options) -> None:
    """Log in one line which options of a --config_file have no effect because another option is not set.

    Only options with their default values are listed: files of other programs spell these out. With another
    value, such an option is rejected, or reported separately (`list_unused_options`).

    Args:
        args: The parsed command line and config file.
        records: The options records made from it.
    """
    names = [name for record in records for name in list_idle(record, args.options_of_file)]
    if names:
        is_single = len(names) == 1
        logger.info(
            "%s: %s %s no effect, as the %s not given.",
            args.config_file,
            ", ".join(names),
            "has" if is_single else "have",
            "option that it belongs to is" if is_single else "options that they belong to are",
        )


def training_parser(
    doc: str | None, trained_options: type[Options] = TrainedNetworkOptions, **settings: Any
) -> Parser:
    """Return a parser with all options that every family's training has.

    Args:
        doc: The script's docstring.
        trained_options: Record with options of what is trained: `TrainedNetworkOptions` or `FullDitOptions`.
        settings: Defaults of the script, settings such as choices, and rejected options, by option.
    """
    parser = Parser(description=doc)
    parser.changes_values = True  # --config_file, a launcher and alternative option names change values
    add_options(parser, ConfigOptions, trained_options, **settings)
    if trained_options is learning_options.FullDitOptions:
        add_options(parser, OptionsAtNetwork, refused=rejected_for_full())
    add_options(parser, TrainingOptions, **settings)
    return parser


def _reject_unseen_sending(parser: argparse.ArgumentParser, values: Mapping[str, Any], place: str) -> None:
    """Raise OptionError if a queued job's config file sets an option that sends data to other machines."""
    if not os.environ.get(FROM_QUEUE):
        return
    for action in parser._actions:
        value = values.get(action.dest)
        is_sending = getattr(action, "reach", "") in (SENDS["reach"], CONFIGURES["reach"])
        if is_sending and value and value not in action.stays:  # type: ignore[attr-defined]
            raise OptionError(
                f"{place}: {action.dest} = {value!r} would send data from this machine, which a job does "
                f"only if its line says so. Omit it there, or write --{action.dest} into the line"
            )


def _check_untyped_values(command: CommandLine, from_file: Mapping[str, Any], place: str) -> None:
    """Check values of a configuration file that could import code or send data from this machine."""
    # Values of options that the user has typed too are not checked: they are not used.
    parser, typed = command
    untyped_names = {
        action.dest for action in parser._actions if getattr(typed, action.dest, None) == action.default
    }
    untyped_from_file = {name: from_file[name] for name in untyped_names & from_file.keys()}
    check_imports(parser, untyped_from_file, place)
    _reject_unseen_sending(parser, untyped_from_file, place)


def read_arguments(
    parser: Parser, argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Parse the command line and call `fill_arguments`; exit on invalid arguments, as argparse does."""
    return fill_arguments(CommandLine(parser, parser.parse_args(argv)), environment)


def fill_arguments(command: CommandLine, environment: Mapping[str, str] = os.environ) -> argparse.Namespace:
    """Return all arguments, in this order of precedence: command line, --config_file, launcher, defaults.

    The launcher, `accelerate launch`, sets precision and compilation by environment variables. Values from a
    file may import only installed code, and in a queued job they may not send data; typed values may.

    Raises:
        OptionError: If a value in the file is not valid, or if an option is rejected.
    """
    parser, typed = command
    # with --output_config the file is written instead of read
    config_file = None if getattr(typed, "output_config", False) else typed.config_file
    defaults = {"mixed_precision": "no", "dynamo_backend": "NO"}
    from_launcher = {
        name: environment.get(variable, defaults[name])
        for name, variable in LAUNCHER_VARIABLE_BY_OPTION.items()
    }
    from_file = {} if config_file is None else read_config_file(config_file, parser)
    args = argparse.Namespace(**vars(typed))
    for name, value in (from_launcher | from_file).items():
        if name not in typed.typed_options:
            setattr(args, name, value)
    precision = from_launcher["mixed_precision"]
    if args.mixed_precision == precision and precision not in run_options.PRECISIONS:
        raise OptionError(
            f"accelerate launch asks for mixed precision {precision}: pass --mixed_precision "
            f"{', '.join(run_options.PRECISIONS)}"
        )
    args.options_of_file = frozenset(from_file) - args.typed_options
    reject_unsupported(parser, args)
    if is_limited():  # started by `run`, whose command line comes from a file too
        check_imports(parser, vars(args), "run.toml")
    elif config_file is not None:
        _check_untyped_values(command, from_file, str(config_file))
    has_steps = "max_train_steps" in typed.typed_options | from_file.keys()
    if has_steps and args.max_train_epochs is not None:
        logger.warning(
            f"--max_train_steps {args.max_train_steps} is ignored because --max_train_epochs "
            f"{args.max_train_epochs} replaces it."
        )
    if hasattr(args, "trainable_modules"):  # full fine-tuning: `read_options` must not create a network
        del args.network_module
    return args
