"""Settings of a LoRA network: `--network_dim`, `--network_alpha`, `--network_dropout`, `--network_args`."""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from modules.command import did_you_mean
from modules.errors import OptionError
from networks.lora_layer import Dropouts

logger = getLogger(__name__)
DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0
SETTINGS = (
    "conv_dim",
    "conv_alpha",
    "rank_dropout",
    "module_dropout",
    "include_patterns",
    "exclude_patterns",
    "loraplus_lr_ratio",
    "dora_wd",
    "verbose",
)


@dataclass(frozen=True)
class LoraSettings:
    """Ranks, dropouts and the choice of modules."""

    rank: int = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    conv_rank: int | None = None  # None: convolutions larger than 1 x 1 get no LoRA
    conv_alpha: float = DEFAULT_ALPHA
    dropouts: Dropouts = Dropouts()
    include: tuple[re.Pattern[str], ...] = ()  # matched at the start of module paths
    exclude: tuple[re.Pattern[str], ...] = ()
    loraplus_lr_ratio: float | None = None
    decomposes: bool = False  # DoRA
    verbose: bool = False

    def takes(self, path: str) -> bool:
        """Whether the module at this path gets a LoRA: it is not excluded, or included again."""
        return not any(p.match(path) for p in self.exclude) or any(p.match(path) for p in self.include)


def read_settings(
    rank: int | None, alpha: float | None, neuron_dropout: float | None, arguments: Mapping[str, Any]
) -> LoraSettings:
    """Read settings from the options and from `--network_args`, whose values may be strings.

    Warns of unknown keys. Raises OptionError if a value is out of range.
    """
    rest = {key: value for key, value in arguments.items() if value is not None}
    conv_rank = _number(rest, "conv_dim", int, 1, math.inf)
    conv_alpha = _number(rest, "conv_alpha", float, 0, math.inf)
    settings = LoraSettings(
        rank=DEFAULT_RANK if rank is None else int(rank),
        alpha=DEFAULT_ALPHA if alpha is None else float(alpha),
        conv_rank=None if conv_rank is None else int(conv_rank),
        conv_alpha=DEFAULT_ALPHA if conv_alpha is None else conv_alpha,
        dropouts=Dropouts(
            neuron_dropout or 0.0,
            _number(rest, "rank_dropout", float, 0, 1) or 0.0,
            _number(rest, "module_dropout", float, 0, 1) or 0.0,
        ),
        include=_patterns(rest, "include_patterns"),
        exclude=_patterns(rest, "exclude_patterns"),
        loraplus_lr_ratio=_number(rest, "loraplus_lr_ratio", float, 0, math.inf),
        decomposes=_switch(rest, "dora_wd"),
        verbose=str(rest.pop("verbose", False)) == "True",
    )
    for key in rest:
        logger.warning(
            f"--network_args {key} is ignored because this network has no such setting."
            f"{did_you_mean(key, SETTINGS)}"
        )
    return settings


def _number(
    rest: dict[str, Any], key: str, kind: type[int] | type[float], low: float, high: float
) -> float | None:
    """Remove a number from `rest` and return it; None if missing. `low` is allowed, `high` is not."""
    text = rest.pop(key, None)
    if text is None or text == "None":
        return None
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value < high:
        limits = f"from {low:g} to below {high:g}" if high < math.inf else f"of at least {low:g}"
        raise OptionError(
            f"--network_args {key}={text}: give {'a whole' if kind is int else 'a'} number {limits}"
        )
    return value


def _switch(rest: dict[str, Any], key: str) -> bool:
    """Remove True or False, or its text, from `rest` and return it; False if missing."""
    text = str(rest.pop(key, False))
    if text not in {"True", "False"}:
        raise OptionError(f"--network_args {key}={text}: give True or False")
    return text == "True"


def _patterns(rest: dict[str, Any], key: str) -> tuple[re.Pattern[str], ...]:
    """Remove a list of regular expressions, or the text of a Python list, from `rest` and return it.

    Raises OptionError for an invalid expression.
    """
    given = rest.pop(key, ())
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            given = None
    if not isinstance(given, (list, tuple)) or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(
            f"""--network_args {key}: write a Python list of strings, such as "{key}=[r'.*ffn.*']"."""
        )
    compiled = []
    for pattern in given:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise OptionError(
                f"--network_args {key}: {pattern!r} is not a regular expression ({error}). Correct it, or "
                "leave it out"
            ) from None
    return tuple(compiled)
