"""Settings of a LoRA network: `--network_dim`, `--network_alpha`, `--network_dropout`, `--network_args`, and
the meaning of a family's own.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from modules.command import did_you_mean
from modules.errors import OptionError
from networks.lora_layer import Dropouts
from networks.lora_products import fused_heights

logger = getLogger(__name__)
Words = tuple[str, ...]  # all of them are parts of a module's path
DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0
# numbers of `--network_args`: their kind, least, and the number that they are below
_NUMBERS: Mapping[str, tuple[type[int] | type[float], float, float]] = {
    "conv_dim": (int, 1, math.inf),
    "conv_alpha": (float, 0, math.inf),
    "rank_dropout": (float, 0, 1),
    "module_dropout": (float, 0, 1),
    "loraplus_lr_ratio": (float, 0, math.inf),
    "loraplus_unet_lr_ratio": (float, 0, math.inf),
    "loraplus_text_encoder_lr_ratio": (float, 0, math.inf),
    "ggpo_sigma": (float, 0, math.inf),
    "ggpo_beta": (float, 0, math.inf),
}
_PATTERNS = ("include_patterns", "exclude_patterns", "network_reg_dims", "network_reg_lrs")
SETTINGS = (*_NUMBERS, *_PATTERNS, "dora_wd", "verbose")
# searched in names of modules; the last that fits counts
ByPattern = tuple[tuple[re.Pattern[str], float], ...]
BlockNumbers = frozenset[int] | None  # numbers of blocks of one list; None: all


@dataclass(frozen=True)
class LoraRules:
    """Modules that a family's LoRA takes, and the arguments that choose among them.

    Paths are those of modules in the network; `targets` and the values of `choices` are their beginnings.
    """

    targets: tuple[str, ...]  # "double_blocks."
    # (argument, kinds of modules whose rank it is), in order: the first given one that fits counts
    types: tuple[tuple[str, tuple[Words, ...]], ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # train_blocks -> targets
    indices: Mapping[str, str] = field(default_factory=dict)  # argument -> list of blocks
    outside: str = ""  # argument: the ranks of modules that are in no block, for `outside_paths` in order
    outside_paths: tuple[str, ...] = ()
    # endings of paths of fused layers -> how many parts, see `fused_heights`
    fused: Mapping[str, int] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)  # argument -> the encoder it switches on

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the names of all arguments that the family's module has of its own."""
        return (
            *(argument for argument, _ in self.types),
            *(("train_blocks",) if self.choices else ()),
            *self.indices,
            *((self.outside,) if self.outside else ()),
            *(("split_qkv",) if self.fused else ()),
            *self.encoders,
        )

    def types_of(self, path: str) -> list[str]:
        """Return the arguments that may hold the rank of a module; the first given one counts."""
        return [
            argument
            for argument, kinds in self.types
            if any(all(word in path for word in words) for words in kinds)
        ]

    def heights(self, path: str, rows: int, columns: int) -> tuple[int, ...]:
        """Return the rows of each part of a fused layer, () for other layers.

        rows, columns: of the layer's weight.
        """
        name = path.replace(".", "_")
        parts = next(
            (count for ending, count in self.fused.items() if name.endswith(ending.replace(".", "_"))), 0
        )
        return fused_heights(parts, rows, columns)


def read_block_numbers(argument: str, text: str) -> BlockNumbers:
    """Read `all`, `none` or a list such as `0,1,8-12`. Raises OptionError for anything else."""
    if text.strip() in ("all", "none"):
        return None if text.strip() == "all" else frozenset()
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise OptionError(
                f"--network_args {argument}={text}: write all, none, or numbers of blocks such as 0,1,8-12"
            )
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return frozenset(numbers)


def read_ranks(argument: str, text: str, paths: Sequence[str]) -> tuple[int, ...]:
    """Read one rank for each of `paths` from `[4,2,0]`; 0 leaves a module out. Raises OptionError if it is
    none.
    """
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if len(parts) != len(paths) or not all(part.isdecimal() for part in parts):
        raise OptionError(
            f"--network_args {argument}={text}: write {len(paths)} ranks, for {', '.join(paths)}, such as "
            f"[{','.join(['4'] * len(paths))}]; 0 leaves one out"
        )
    return tuple(map(int, parts))


@dataclass(frozen=True)
class LoraSettings:
    """Ranks, dropouts, learning rates and the choice of modules."""

    rank: int = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    conv_rank: int | None = None  # None: convolutions larger than 1 x 1 get no LoRA
    conv_alpha: float = DEFAULT_ALPHA
    dropouts: Dropouts = Dropouts()
    # matched at the start of module paths: what is excluded may be included again
    include: tuple[re.Pattern[str], ...] = ()
    exclude: tuple[re.Pattern[str], ...] = ()
    loraplus_lr_ratio: float | None = None
    loraplus_encoder_ratio: float | None = None
    decomposes: bool = False  # DoRA
    verbose: bool = False
    reg_ranks: ByPattern = ()
    reg_rates: ByPattern = ()
    perturbation: tuple[float, float] | None = None  # LoRA-GGPO: sigma and beta
    rules: LoraRules | None = None  # of the family's module; None: the network's spec says what takes part
    type_ranks: Mapping[str, int] = field(default_factory=dict)  # by the argument of a type
    train_blocks: str | None = None
    block_numbers: Mapping[str, BlockNumbers] = field(default_factory=dict)  # by argument
    outside_ranks: tuple[int, ...] = ()
    splits: bool = False  # factors for each part of a fused layer
    encoders_off: frozenset[str] = frozenset()  # prefixes of text encoders that get no LoRA


def read_settings(
    rank: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    arguments: Mapping[str, Any],
    rules: LoraRules | None = None,
) -> LoraSettings:
    """Read settings from the options and from `--network_args`, whose values may be strings.

    rules: of the family's module. Raises OptionError if a key is unknown or a value is out of range.
    """
    rest = {key: value for key, value in arguments.items() if value is not None}
    given = {key: _number(rest, key, *limits) for key, limits in _NUMBERS.items()}
    ratios = [given[f"loraplus_{part}lr_ratio"] for part in ("", "unet_", "text_encoder_")]
    sigma, beta = given["ggpo_sigma"], given["ggpo_beta"]
    if (sigma is None) != (beta is None):
        raise OptionError(
            "--network_args ggpo_sigma and ggpo_beta need each other: give both, such as ggpo_sigma=0.03 "
            "ggpo_beta=0.01"
        )
    dropouts = [neuron_dropout, given["rank_dropout"], given["module_dropout"]]
    settings = LoraSettings(
        rank=DEFAULT_RANK if rank is None else int(rank),
        alpha=DEFAULT_ALPHA if alpha is None else float(alpha),
        conv_rank=None if given["conv_dim"] is None else int(given["conv_dim"]),
        conv_alpha=DEFAULT_ALPHA if given["conv_alpha"] is None else given["conv_alpha"],
        dropouts=Dropouts(*(share or 0.0 for share in dropouts)),
        include=_patterns(rest, "include_patterns"),
        exclude=_patterns(rest, "exclude_patterns"),
        loraplus_lr_ratio=ratios[0] if ratios[1] is None else ratios[1],
        loraplus_encoder_ratio=ratios[0] if ratios[2] is None else ratios[2],
        decomposes=_switch(rest, "dora_wd"),
        verbose=_switch(rest, "verbose"),
        reg_ranks=_by_pattern(rest, "network_reg_dims", int),
        reg_rates=_by_pattern(rest, "network_reg_lrs", float),
        perturbation=None if sigma is None or beta is None else (sigma, beta),
        rules=rules,
        **({} if rules is None else _by_rules(rest, rules)),
    )
    if rest:
        known = (*SETTINGS, *(() if rules is None else rules.arguments))
        key = next(iter(rest))
        raise OptionError(
            f"--network_args {key}: this network has no such setting.{did_you_mean(key, known)} It has "
            f"{', '.join(known)}"
        )
    exclusive = {
        "split_qkv": settings.splits,
        "ggpo_sigma": sigma is not None,
        "dora_wd": settings.decomposes,
    }
    if len(both := [name for name, is_on in exclusive.items() if is_on]) > 1:
        raise OptionError(f"--network_args {both[0]} and {both[-1]} cannot be used together: leave one out")
    return settings


def _by_rules(rest: dict[str, Any], rules: LoraRules) -> dict[str, Any]:
    """Remove the settings that only the family's module has from `rest` and return them as fields."""
    ranks = {argument: _number(rest, argument, int, 0, math.inf) for argument, _ in rules.types}
    blocks = rest.pop("train_blocks", None) if rules.choices else None
    if blocks is not None and blocks not in rules.choices:
        raise OptionError(f"--network_args train_blocks={blocks}: give one of {', '.join(rules.choices)}")
    numbers = {
        argument: read_block_numbers(argument, str(rest.pop(argument)))
        for argument in rules.indices
        if argument in rest
    }
    outside = (
        read_ranks(rules.outside, str(rest.pop(rules.outside)), rules.outside_paths)
        if rules.outside and rules.outside in rest
        else ()
    )
    return {
        "type_ranks": {argument: int(rank) for argument, rank in ranks.items() if rank is not None},
        "train_blocks": blocks,
        "block_numbers": numbers,
        "outside_ranks": outside,
        "splits": _switch(rest, "split_qkv") if rules.fused else False,
        "encoders_off": frozenset(
            prefix for argument, prefix in rules.encoders.items() if not _switch(rest, argument)
        ),
    }


def _by_pattern(rest: dict[str, Any], key: str, kind: type[int] | type[float]) -> ByPattern:
    """Remove `pattern=number,pattern=number` from `rest` and return its pairs."""
    text = rest.pop(key, None)
    if text is None:
        return ()
    pairs = []
    for part in str(text).split(","):
        pattern, equals, number = part.strip().partition("=")
        found = _read_number(number, kind)
        if not equals or not pattern.strip() or found is None:
            raise OptionError(
                f"--network_args {key}: {part.strip()!r} is no pair; write pattern=number,pattern=number, "
                f"with numbers {'of at least 0 that are whole' if kind is int else 'of at least 0'}"
            )
        pairs.append((_compile(key, pattern.strip()), found))
    return tuple(pairs)


def find_by_pattern(pairs: ByPattern, name: str) -> tuple[int, ...]:
    """Return the places of the patterns that a name fits; the last of them counts."""
    return tuple(place for place, (pattern, _) in enumerate(pairs) if pattern.search(name))


def log_overlaps(argument: str, pairs: ByPattern, found: Sequence[tuple[int, ...]]) -> None:
    """Log which patterns take modules from earlier ones. found: `find_by_pattern` of each module."""
    taken: dict[tuple[int, int], int] = {}
    for places in found:
        for place in places[:-1]:
            taken[place, places[-1]] = taken.get((place, places[-1]), 0) + 1
    for (place, last), count in sorted(taken.items()):
        logger.info(
            f"--network_args {argument}: {count} modules fit {pairs[place][0].pattern!r} and the later "
            f"{pairs[last][0].pattern!r}, which counts ({pairs[last][1]:g})"
        )


def _number(
    rest: dict[str, Any], key: str, kind: type[int] | type[float], low: float, high: float
) -> float | None:
    """Remove a number from `rest` and return it; None if missing. `low` is allowed, `high` is not."""
    text = rest.pop(key, None)
    if text is None or text == "None":
        return None
    value = _read_number(text, kind)
    if value is None or not low <= value < high:
        limits = f"from {low:g} to below {high:g}" if high < math.inf else f"of at least {low:g}"
        raise OptionError(
            f"--network_args {key}={text}: give {'a whole' if kind is int else 'a'} number {limits}"
        )
    return value


def _read_number(text: Any, kind: type[int] | type[float]) -> float | None:
    """Return a number of at least 0 from its text, None if it is none."""
    try:
        value = kind(text)
    except (ValueError, TypeError):
        return None
    return value if 0 <= value < math.inf else None


def _switch(rest: dict[str, Any], key: str) -> bool:
    """Remove True or False, or its text, from `rest` and return it; False if missing."""
    text = str(rest.pop(key, False))
    if text.lower() not in {"true", "false"}:
        raise OptionError(f"--network_args {key}={text}: give True or False")
    return text.lower() == "true"


def _patterns(rest: dict[str, Any], key: str) -> tuple[re.Pattern[str], ...]:
    """Remove a list of regular expressions, or the text of a Python list, from `rest` and return it.

    Raises OptionError for an invalid expression.
    """
    given = rest.pop(key, ())
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            given = None
    if not isinstance(given, (list, tuple)) or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(
            f"""--network_args {key}: write a Python list of strings, such as "{key}=[r'.*ffn.*']"."""
        )
    return tuple(_compile(key, pattern) for pattern in given)


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"--network_args {key}: {pattern!r} is not a regular expression ({error}). Correct it, or leave "
            "it out"
        ) from None
