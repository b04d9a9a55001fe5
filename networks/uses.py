"""LoRA files as commands use them: strengths, parts, and warnings of parts that a model lacks."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

from modules.errors import OptionError
from networks.key_formats import OURS
from networks.loading import LoraFile, list_some, read_lora, warn_of_rest
from networks.metadata import expert_of, in_words
from networks.module_names import choose_family, is_optional, read_family
from networks.names.layouts import FOR_BOTH, FamilyNames
from networks.options import LoraOptions, LoraPatternOptions

logger = getLogger(__name__)


@dataclass(frozen=True)
class LoraUse:
    """One LoRA file and how it is used.

    Patterns are regular expressions searched in its tensor names (ours). Where the model calls a module
    otherwise, as FramePack does HunyuanVideo's, its name counts too: a pattern may be written for either, and
    choose a part of a fused module. Raises OptionError where a pattern is none.
    """

    lora: LoraFile
    multiplier: float = 1.0
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        for pattern in (self.include, self.exclude):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise OptionError(
                    f"a LoRA pattern for {self.lora.path} is no regular expression: {error}"
                ) from None

    def for_expert(self, expert: str | None) -> "LoraUse":
        """Return the same for an expert's part of the file, if it has parts, and warn if it is another one's.

        Raises as `LoraFile.for_expert`.
        """
        lora = self.lora.for_expert(expert)
        warn_of_other_expert(lora, expert)
        return replace(self, lora=lora)

    def keeps(self, factors: Iterable[str], *names: str) -> bool:
        """Whether the patterns keep one of a module's factors; names: the module's names in the file and in
        the model.
        """
        return any(self._keeps([f"{name}.{factor}" for name in names]) for factor in factors)

    def _keeps(self, tensor: Sequence[str]) -> bool:
        included = self.include is None or any(re.search(self.include, name) for name in tensor)
        return included and (
            self.exclude is None or not any(re.search(self.exclude, name) for name in tensor)
        )


def lora_uses(
    loras: LoraOptions, patterns: LoraPatternOptions | None = None, with_texts: bool = False
) -> list[LoraUse]:
    """Read the files of `--lora_weight`; return each with its multiplier and patterns.

    with_texts: with their changes of text encoders.
    """
    files = loras.lora_weight or ()
    includes = _per_file(files, patterns.include_patterns if patterns else None, "--include_patterns")
    excludes = _per_file(files, patterns.exclude_patterns if patterns else None, "--exclude_patterns")
    rows = zip(files, loras.multipliers(), includes, excludes, strict=True)
    return [
        LoraUse(read_lora(path, by_expert=True, with_texts=with_texts), multiplier, include, exclude)
        for path, multiplier, include, exclude in rows
    ]


def _per_file(files: Sequence[Path], patterns: Sequence[str] | None, option: str) -> list[str | None]:
    """Return one pattern per file; None for files without one."""
    given = list(patterns or ())
    if len(given) > len(files):
        raise OptionError(
            f"{option} has {len(given)} patterns for {len(files)} LoRA files: give one per file, in the same "
            "order"
        )
    return [*given, *[None] * (len(files) - len(given))]


def warn_of_absent(
    path: Path, absent: Sequence[str], whole: int, what: str, model: FamilyNames | None
) -> None:
    """Warn of parts of a LoRA that a model does not have, as `warn_of_rest`.

    absent: under our names, with our prefix, `lora_unet_x.weight` or `lora_unet_x`. Parts that only some
    models of the family have get their own warning: the others still work without them.
    """
    optional = [
        name
        for name in absent
        if model is not None and is_optional(name.removeprefix(OURS).partition(".")[0], model)
    ]
    if optional and model is not None:
        logger.warning(
            f"{path}: {len(optional)} of {whole} {what}: they are for {model.optional_words}; the rest is "
            f"used without them: {list_some(optional)}"
        )
    warn_of_rest(path, [name for name in absent if name not in set(optional)], whole, what)


def warn_of_other_family(lora: LoraFile, model: FamilyNames | None) -> None:
    """Warn if a LoRA fits by its names but its metadata say that it was trained for another model."""
    made = read_family(lora.metadata)
    if made is None or model is None or made is model or made.name in model.takes:
        return
    logger.warning(
        f"{lora.path} was trained for {made.name}, as its metadata say, and is used on a {model.name} model. "
        "The names are the same, what it has learned is not: do not expect much of it."
    )


def family_of_network(names: Iterable[str], lora: LoraFile) -> FamilyNames | None:
    """Return the family that a network was built for, by the names of its modules (ours, with our prefix).

    These are only some of a model's: if they are names of the LoRA's family too, it is taken for that.
    """
    made = read_family(lora.metadata)
    return choose_family((name.removeprefix(OURS) for name in names), None if made is None else made.name)


def warn_of_other_expert(lora: LoraFile, expert: str | None) -> None:
    """Warn if a LoRA was trained for another expert than the one it is added to.

    expert: name of the latter; empty or None if the model has no experts or it is unknown which one it is.
    """
    if not expert or lora.expert in (None, FOR_BOTH, expert):
        return
    says = "name says" if expert_of(lora.metadata, Path()) is None else "metadata say"
    logger.warning(
        f"{lora.path} was trained for the {in_words(lora.expert)}, as its {says}, and is loaded into the "
        f"{in_words(expert)}: what it has learned is about other noise levels. Give the file for the "
        f"{in_words(expert)}, if there is one."
    )
