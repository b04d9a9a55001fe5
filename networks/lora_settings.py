"""Read the settings of a LoRA network: `--network_dim`, `--network_alpha`, `--network_args` and so on."""

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from typing import Any, NamedTuple

from torch import nn

from modules.command import did_you_mean
from modules.errors import OptionError
from networks.block_numbers import KEYS, BlockSettings, read_blocks
from networks.formats.lycoris import ALGORITHMS
from networks.kinds.composing import SWITCHES, VARIANTS
from networks.kinds.contract import NetworkKind, RankRule
from networks.lora_layer import Dropouts
from networks.lora_products import count_fused_part_rows
from networks.names.layouts import LoraRules
from networks.patterns import NamePattern, describe_unfit, in_any_spelling

logger = getLogger(__name__)
DEFAULT_CONV_ALPHA = 1.0
MAX_BLOCK_DIGITS = 4  # of the number of a block
Reader = Callable[[str, Any], Any]  # name and string of an argument -> its value; raises OptionError
Pattern = re.Pattern[str] | NamePattern
# patterns with their values, searched in module names; the last match counts
PatternValues = tuple[tuple[Pattern, float], ...]
BlockNumbers = frozenset[int] | None  # block numbers in one list; None: all


def family_readers(rules: LoraRules) -> dict[str, Reader]:
    """Return parsers for the --network_args that only one family's network module has."""
    readers: dict[str, Reader] = {}
    for argument, _ in rules.rank_arguments:  # ranks by type of module
        readers[argument] = partial(_read_number, int)
    if rules.train_blocks_choices:
        readers["train_blocks"] = partial(_read_choice, rules.train_blocks_choices)
    # arguments that select blocks by index
    for argument in rules.block_lists_by_argument:
        readers[argument] = read_block_numbers
    # one rank for each module outside the blocks
    if rules.outside_ranks_argument:
        readers[rules.outside_ranks_argument] = partial(read_ranks, rules.outside_paths)
    if rules.num_fused_parts:
        readers["split_qkv"] = _read_switch
    for argument in (*rules.encoder_switches, *rules.module_switches):
        readers[argument] = _read_switch
    return readers


def read_block_numbers(argument: str, typed: Any) -> BlockNumbers:
    """Parse block indices from `all`, `none` or a list such as `0,1,8-12`; return None for all blocks.

    Args:
        argument: Name of the argument, for messages.
        typed: Value of the argument.

    Raises:
        OptionError: If the value has another form.
    """
    text = str(typed)
    if text.strip() == "all":
        return None
    if text.strip() == "none":
        return frozenset()
    numbers: set[int] = set()
    for list_item in text.split(","):
        first, dash, last = list_item.strip().partition("-")
        if not dash:
            last = first
        # numbers of this length are of no model, and a range of them would fill the memory
        is_short = len(first) <= MAX_BLOCK_DIGITS and len(last) <= MAX_BLOCK_DIGITS
        if not (is_short and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise OptionError(
                f"--network_args {argument}={text}: write all, none, or numbers of blocks such as 0,1,8-12"
            )
        numbers.update(range(int(first), int(last) + 1))
    return frozenset(numbers)


def read_ranks(paths: Sequence[str], argument: str, typed: Any) -> tuple[int, ...]:
    """Parse one rank per item of `paths` from a string such as `[4,2,0]`; 0 leaves a module out.

    Args:
        paths: Paths of the modules.
        argument: Name of the argument, for messages.
        typed: Value of the argument.

    Raises:
        OptionError: If the value has another form.
    """
    text = str(typed)
    list_items = text.strip().removeprefix("[").removesuffix("]").split(",")
    ranks = [item.strip() for item in list_items]
    if len(ranks) != len(paths) or not all(rank.isdecimal() for rank in ranks):
        raise OptionError(
            f"--network_args {argument}={text}: write {len(paths)} ranks, for {', '.join(paths)}, such as "
            f"[{','.join(['4'] * len(paths))}]; 0 leaves one out"
        )
    return tuple(map(int, ranks))


@dataclass(frozen=True)
class LoraSettings:
    """Parsed settings of a LoRA: ranks, dropout rates, learning rates, and which modules get a LoRA."""

    rank: int
    alpha: float
    conv_rank: int | None = None  # None: convolutions with kernels larger than 1 x 1 get no LoRA
    conv_alpha: float = DEFAULT_CONV_ALPHA
    dropouts: Dropouts | None = None
    # matched at the start of module paths; `include` takes precedence over `exclude`
    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    loraplus_lr_ratio: float | None = None
    loraplus_encoder_ratio: float | None = None
    variants: tuple[NetworkKind, ...] = ()  # kinds enabled by a switch in --network_args
    verbose: bool = False
    pattern_ranks: PatternValues = ()  # network_reg_dims
    pattern_learning_rates: PatternValues = ()  # network_reg_lrs: learning rates
    ggpo_sigma_and_beta: tuple[float, float] | None = None  # LoRA-GGPO: sigma and beta
    rank_rule: RankRule | None = None  # which ranks are active at which noise level (T-LoRA)
    family_rules: LoraRules | None = None  # rules of the family's network module
    type_ranks: Mapping[str, int] = field(default_factory=dict)  # argument for a type of module -> rank
    train_blocks: str | None = None
    block_numbers: Mapping[str, BlockNumbers] = field(default_factory=dict)  # argument -> trained blocks
    outside_ranks: tuple[int, ...] = ()  # ranks of `rules.outside_paths`
    splits_fused_layers: bool = False  # split_qkv: whether each part of a fused layer gets its own factors
    disabled_encoders: frozenset[str] = frozenset()  # prefixes of text encoders that get no LoRA
    enabled_optional_modules: frozenset[str] = frozenset()  # parts of `DitSpec.lora_exclude` that get a LoRA
    block_settings: BlockSettings | None = None  # ranks and rates of numbered blocks

    @property
    def has_convolutions(self) -> bool:
        """Return whether convolutions with kernels larger than 1 x 1 get a LoRA."""
        return self.conv_rank is not None or (
            self.block_settings is not None and self.block_settings.has_convolutions
        )

    @property
    def has_rank_dropout(self) -> bool:
        """Return whether rank dropout is used."""
        return self.dropouts is not None and self.dropouts.rank > 0

    @property
    def ranks_by_pattern(self) -> list[int]:
        """Ranks in the value of network_reg_dims."""
        return [int(rank) for _, rank in self.pattern_ranks]

    def split_sizes_of(self, path: str, module: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
        """Return the number of rows of each part of a fused layer, such as q, k and v.

        Args:
            path: Dotted path of the layer.
            module: The layer.

        Returns:
            Row counts; () if the layer is not fused, or if its parts share one pair of factors.
        """
        if not self.splits_fused_layers or self.family_rules is None or not isinstance(module, nn.Linear):
            return ()
        name = path.replace(".", "_")
        for ending, num_parts in self.family_rules.num_fused_parts.items():
            if name.endswith(ending.replace(".", "_")):
                return count_fused_part_rows(num_parts, rows=module.out_features, columns=module.in_features)
        return ()  # the layer is not fused


def read_settings(
    rank: int,
    alpha: float,
    neuron_dropout: float | None,
    arguments: Mapping[str, Any],
    rules: LoraRules | None = None,
) -> LoraSettings:
    """Parse settings from the options and from `--network_args`, whose values may be strings.

    Args:
        rank: Value of --network_dim, or the default of the kind.
        alpha: Value of --network_alpha.
        neuron_dropout: Value of --network_dropout.
        arguments: Values of --network_args.
        rules: Rules of the family's network module; None without such rules.

    Raises:
        OptionError: If a key is unknown or a value is out of range.
    """
    # a family's text encoders get no LoRA unless an argument enables them
    disabled_encoders: frozenset[str] = (
        frozenset() if rules is None else frozenset(rules.encoder_switches.values())
    )
    settings = LoraSettings(
        rank=rank,
        alpha=float(alpha),
        dropouts=Dropouts(neuron=neuron_dropout) if neuron_dropout else None,
        family_rules=rules,
        disabled_encoders=disabled_encoders,
    )
    return _apply_arguments(settings, arguments, rules) if arguments else settings


def _apply_arguments(
    settings: LoraSettings, arguments: Mapping[str, Any], rules: LoraRules | None
) -> LoraSettings:
    """Return settings changed by `--network_args`. Raises OptionError if an argument is invalid."""
    block_settings = read_blocks(arguments)  # reads the arguments in KEYS
    values = _read_values({key: text for key, text in arguments.items() if key not in KEYS}, rules)
    rank_rule = _read_rank_rule(values, settings.rank)
    ggpo_sigma_and_beta = None
    if "ggpo_sigma" in values:
        ggpo_sigma_and_beta = (values["ggpo_sigma"], values["ggpo_beta"])
    shared_ratio = values.get("loraplus_lr_ratio")
    # Dropout rates with those in --network_args added; None if nothing is dropped
    rank = values.get("rank_dropout") or 0.0
    module = values.get("module_dropout") or 0.0
    settings = replace(
        settings,
        conv_rank=values.get("conv_dim"),
        conv_alpha=values.get("conv_alpha", DEFAULT_CONV_ALPHA),
        dropouts=(
            replace(settings.dropouts or Dropouts(), rank=rank, module=module)
            if rank or module
            else settings.dropouts
        ),
        include=values.get("include_patterns", ()),
        exclude=values.get("exclude_patterns", ()),
        loraplus_lr_ratio=values.get("loraplus_unet_lr_ratio", shared_ratio),
        loraplus_encoder_ratio=values.get("loraplus_text_encoder_lr_ratio", shared_ratio),
        variants=tuple(kind for switch, kind in SWITCHES.items() if values.get(switch, False)),
        verbose=values.get("verbose", False),
        pattern_ranks=values.get("network_reg_dims", ()),
        pattern_learning_rates=values.get("network_reg_lrs", ()),
        ggpo_sigma_and_beta=ggpo_sigma_and_beta,
        rank_rule=rank_rule,
        block_settings=block_settings,
    )
    return settings if rules is None else _apply_family_arguments(settings, values, rules)


def _apply_family_arguments(
    settings: LoraSettings, values: Mapping[str, Any], rules: LoraRules
) -> LoraSettings:
    """Return settings changed by those --network_args that only one family's network module has."""
    type_arguments = [argument for argument, _ in rules.rank_arguments]
    disabled = (prefix for argument, prefix in rules.encoder_switches.items() if not values.get(argument))
    enabled = (part for argument, part in rules.module_switches.items() if values.get(argument))
    return replace(
        settings,
        type_ranks=_select_arguments(type_arguments, values),
        train_blocks=values.get("train_blocks"),
        block_numbers=_select_arguments(rules.block_lists_by_argument, values),
        outside_ranks=values.get(rules.outside_ranks_argument, ()),
        splits_fused_layers=values.get("split_qkv", False),
        disabled_encoders=frozenset(disabled),
        enabled_optional_modules=frozenset(enabled),
    )


def _select_arguments(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of these arguments, leaving out arguments that are not set."""
    return {name: values[name] for name in names if name in values}


def _read_values(arguments: Mapping[str, Any], rules: LoraRules | None) -> dict[str, Any]:
    """Parse the `--network_args` that are not None. Raises OptionError if one is invalid."""
    readers = dict(_READERS)
    if rules is not None:
        readers |= family_readers(rules)
    typed = {key: text for key, text in arguments.items() if text is not None}
    values: dict[str, Any] = {}
    for key, read in readers.items():
        if key not in typed:
            continue
        value = read(key, typed[key])
        if value is not None:  # None: the string "None"
            values[key] = value
    # Raise OptionError for --network_args that are mistyped or belong to another program
    unknown = [key for key in typed if key not in readers]
    if "algo" in unknown:
        kind = ALGORITHMS.get(str(typed["algo"]).lower())
        module = "one of the modules in --help" if kind is None else kind.network_module
        raise OptionError(
            f"--network_args algo={typed['algo']}: algo is a setting of LyCORIS. Here --network_module "
            f"selects the kind of network: pass {module}, and omit algo"
        )
    if unknown:
        raise OptionError(
            f"--network_args {unknown[0]}: this network has no such setting."
            f"{did_you_mean(unknown[0], (*readers, *KEYS))} Its settings are {', '.join((*readers, *KEYS))}"
        )
    # Raise OptionError for --network_args that require or exclude each other
    if ("ggpo_sigma" in values) != ("ggpo_beta" in values):
        raise OptionError(
            "--network_args ggpo_sigma and ggpo_beta need each other: pass both, such as ggpo_sigma=0.03 "
            "ggpo_beta=0.01"
        )
    # `is not False`: ggpo_sigma is a number, and 0 counts as set
    exclusive = [
        name for name in ("split_qkv", "ggpo_sigma", *SWITCHES) if values.get(name, False) is not False
    ]
    if len(exclusive) > 1:
        raise OptionError(
            f"--network_args {exclusive[0]} and {exclusive[-1]} cannot be used together: omit one"
        )
    return values


def _read_rank_rule(values: Mapping[str, Any], rank: int) -> RankRule | None:
    """Return the rule that selects active ranks by noise level (T-LoRA); None if all ranks are active."""
    for kind in VARIANTS:
        kind_arguments = (kind.switch, *kind.numbers)
        if values.keys().isdisjoint(kind_arguments):
            continue
        rule = kind.read_rule_of_arguments(values, rank)
        if rule is not None:
            return rule
    return None


def fit_patterns(settings: LoraSettings, modules: Sequence[tuple[str, str]]) -> LoraSettings:
    """Return settings whose patterns match names with dots or underscores; warn of patterns without a match.

    Patterns that match a module as written are unchanged; the others are tried in all spellings.

    Args:
        settings: Settings of the network.
        modules: Modules of all networks that may get a LoRA: (prefix of the name in files, dotted path).
    """
    names = _ModuleNames(
        paths=[path for _, path in modules],
        names_in_files=[prefix + path.replace(".", "_") for prefix, path in modules],
    )
    return replace(
        settings,
        include=_fit_path_patterns("include_patterns", settings.include, names),
        exclude=_fit_path_patterns("exclude_patterns", settings.exclude, names),
        pattern_ranks=_fit_name_patterns("network_reg_dims", settings.pattern_ranks, names),
        pattern_learning_rates=_fit_name_patterns("network_reg_lrs", settings.pattern_learning_rates, names),
    )


class _ModuleNames(NamedTuple):
    """All modules that may get a LoRA: their dotted paths, and their underscored names in LoRA files."""

    paths: Sequence[str]
    names_in_files: Sequence[str]


def _fit_path_patterns(
    argument: str, patterns: tuple[Pattern, ...], names: _ModuleNames
) -> tuple[Pattern, ...]:
    """Fit patterns that match a path from its start, as include and exclude patterns do."""
    fitted = []
    for pattern in patterns:
        matches_as_written = any(pattern.match(path) for path in names.paths)
        fitted.append(pattern if matches_as_written else _fit_pattern(argument, pattern, names))
    return tuple(fitted)


def _fit_name_patterns(argument: str, patterns: PatternValues, names: _ModuleNames) -> PatternValues:
    """Fit patterns that match anywhere in a name, as patterns with values do."""
    fitted = []
    for pattern, value in patterns:
        matches_as_written = any(pattern.search(name) for name in names.names_in_files)
        fitted.append((pattern if matches_as_written else _fit_pattern(argument, pattern, names), value))
    return tuple(fitted)


def _fit_pattern(argument: str, pattern: Pattern, names: _ModuleNames) -> Pattern:
    """Return a pattern that matches the modules that `pattern` would match if dots equaled underscores."""
    # If there are no such modules, `pattern` itself is returned, with a warning unless there are no modules.
    if not names.paths:
        return pattern
    any_spelling = re.compile(in_any_spelling(pattern.pattern))
    spellings: set[str] = set()
    for path, name in zip(names.paths, names.names_in_files, strict=True):
        if pattern.search(path) or any_spelling.search(name):
            spellings.update((path, name))
    if spellings:
        return NamePattern(pattern.pattern, frozenset(spellings))
    logger.warning("--network_args %s: %s.", argument, describe_unfit(pattern.pattern, names.names_in_files))
    return pattern


def find_by_pattern(pairs: PatternValues, name: str) -> tuple[int, ...]:
    """Return the indices of all pairs (pattern, value) whose pattern matches the module name."""
    return tuple(index for index, (pattern, _) in enumerate(pairs) if pattern.search(name))


def log_overlaps(argument: str, pairs: PatternValues, matches: Sequence[tuple[int, ...]]) -> None:
    """Log which patterns override earlier patterns.

    Args:
        argument: Name of the argument.
        pairs: Patterns with their values.
        matches: For each module, the result of `find_by_pattern`.
    """
    # (overridden pattern, last matching pattern, which takes precedence) -> number of modules
    counts = Counter((index, indices[-1]) for indices in matches for index in indices[:-1])
    for (index, last), count in sorted(counts.items()):
        overridden, _ = pairs[index]
        pattern, number = pairs[last]
        logger.info(
            f"--network_args {argument}: {count} modules match {overridden.pattern!r} and the later "
            f"{pattern.pattern!r}, which takes precedence ({number:g})"
        )


def _read_number(
    number_type: type[int] | type[float],
    argument: str,
    text: Any,
    minimum: float = 0,
    below: float = math.inf,
) -> float | None:
    """Parse a number from --network_args; return None for the string "None"."""
    if text == "None":
        return None
    value = _parse_number(number_type, text)
    if value is None or not minimum <= value < below:
        limits = f"from {minimum:g} to below {below:g}" if below < math.inf else f"of at least {minimum:g}"
        article = "a whole" if number_type is int else "a"
        raise OptionError(f"--network_args {argument}={text}: pass {article} number {limits}")
    return value


def _parse_number(number_type: type[int] | type[float], text: Any) -> float | None:
    """Parse a finite number that is at least 0; return None for anything else."""
    try:
        value = number_type(text)
    except (ValueError, TypeError):
        return None
    return value if 0 <= value < math.inf else None


def _read_pairs(number_type: type[int] | type[float], argument: str, text: Any) -> PatternValues:
    """Parse pairs `pattern=number,pattern=number`. Raises OptionError if a pair is malformed."""
    pairs = []
    for pair in str(text).split(","):
        pattern, equals, number_text = pair.strip().partition("=")
        number = _parse_number(number_type, number_text)
        if not equals or not pattern.strip() or number is None:
            restriction = " that are whole" if number_type is int else ""
            raise OptionError(
                f"--network_args {argument}: {pair.strip()!r} is not a pair; write pattern=number,"
                f"pattern=number, with numbers of at least 0{restriction}"
            )
        pairs.append((_compile(argument, pattern.strip()), number))
    return tuple(pairs)


def _read_switch(argument: str, text: Any) -> bool:
    if str(text).lower() not in {"true", "false"}:
        raise OptionError(f"--network_args {argument}={text}: pass True or False")
    return str(text).lower() == "true"


def _read_choice(choices: Collection[str], argument: str, text: Any) -> Any:
    if text not in choices:
        raise OptionError(f"--network_args {argument}={text}: pass one of {', '.join(choices)}")
    return text


def _read_patterns(argument: str, typed: Any) -> tuple[re.Pattern[str], ...]:
    """Compile regular expressions from a list, which may be written as in Python: `['a', 'b']`."""
    patterns = typed
    if isinstance(typed, str):
        try:
            patterns = ast.literal_eval(typed)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            patterns = None
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        example = f"{argument}=[r'.*ffn.*']"
        raise OptionError(f'--network_args {argument}: write a Python list of strings, such as "{example}".')
    return tuple(_compile(argument, pattern) for pattern in patterns)


def _compile(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"--network_args {argument}: {pattern!r} is not a regular expression ({error}). Fix it, or "
            "omit it"
        ) from None


REG_RATES = "network_reg_lrs"


def read_rates(argument: str, text: Any) -> PatternValues:
    """Parse (pattern, learning rate) pairs from a string. Raises OptionError if a pair is malformed."""
    return _read_pairs(float, argument, text)


def _make_kind_readers() -> dict[str, Reader]:
    """Return parsers for the --network_args that enable network kinds and set their parameters."""
    readers: dict[str, Reader] = {}
    for kind in SWITCHES.values():
        if kind.numbers:
            readers[kind.switch] = _read_switch
        for name, number_type in kind.numbers.items():
            readers[name] = partial(_read_number, number_type, minimum=1 if number_type is int else 0)
    return readers


_read_probability = partial(_read_number, float, below=1)
_read_float = partial(_read_number, float)
# in the order of the list in the message for an unknown argument
_READERS: Mapping[str, Reader] = {
    "conv_dim": partial(_read_number, int, minimum=1),
    "conv_alpha": _read_float,
    "rank_dropout": _read_probability,
    "module_dropout": _read_probability,
    "loraplus_lr_ratio": _read_float,
    "loraplus_unet_lr_ratio": _read_float,
    "loraplus_text_encoder_lr_ratio": _read_float,
    "ggpo_sigma": _read_float,
    "ggpo_beta": _read_float,
    "include_patterns": _read_patterns,
    "exclude_patterns": _read_patterns,
    "network_reg_dims": partial(_read_pairs, int),
    REG_RATES: read_rates,
    **dict.fromkeys([kind.switch for kind in SWITCHES.values() if not kind.numbers], _read_switch),
    "verbose": _read_switch,
    **_make_kind_readers(),
}
