"""Add LoRAs to the weights of a model, which are handed over one by one while it is loaded or copied."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from networks.deltas import (
    DORA,
    Factors,
    bias_delta,
    decompose,
    has_input_magnitudes,
    other_channels,
    rows_of,
    weight_delta,
)
from networks.key_formats import OURS, module_of_tensor, rename_modules
from networks.loading import (
    LoraFile,
    list_some,
    read_lora,
    warn_of_absent,
    warn_of_other_expert,
    warn_of_other_family,
)
from networks.module_names import Relative, choose_family, relatives
from networks.names.layouts import FIRST_LAYERS, FamilyNames
from networks.options import LoraOptions, LoraPatternOptions
from networks.parts import part_rows

logger = getLogger(__name__)
_BLOCK_ELEMENTS = 1 << 20  # of a weight that are changed at once: 4 MB in float32
_META = torch.device("meta")
# HunyuanVideo in diffusers' layout has no name that FramePack has not too; FramePack has more
LIKELY_MODEL = "hunyuan_video"


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
        """Whether the patterns keep one of a module's factors; names: what the module is called, by the file
        and by the model.
        """
        return any(self._keeps([f"{name}.{factor}" for name in names]) for factor in factors)

    def _keeps(self, tensor: Sequence[str]) -> bool:
        included = self.include is None or any(re.search(self.include, name) for name in tensor)
        return included and (
            self.exclude is None or not any(re.search(self.exclude, name) for name in tensor)
        )


@dataclass(frozen=True)
class _Change:
    """Change of one parameter by one LoRA."""

    use: LoraUse
    factors: Factors
    delta: Callable[[Factors, torch.device], Tensor | None]
    rows: slice | None = None  # of the parameter, where the LoRA is for a part of it; None: all

    def on(self, device: torch.device) -> "_Change":
        """Return the change with its factors on `device`."""
        return replace(
            self, factors={part: t if part == "alpha" else t.to(device) for part, t in self.factors.items()}
        )

    def placed(self, relative: Relative | None, weight: Tensor) -> "_Change":
        """The same for a weight that is part of the LoRA's module, or of which that module is a part.

        Where the heights do not go together it stays as it is, to be found out by its shape.
        """
        if relative is None:
            return self
        own, whole = self._height(), len(weight)
        rows = (
            part_rows(relative.part, own, whole) if relative.is_part else part_rows(relative.part, whole, own)
        )
        if rows is None:
            return self
        if isinstance(rows, slice) and relative.is_part:
            return replace(self, rows=rows)
        if rows == slice(0, own):
            return self
        if has_input_magnitudes(self.factors):
            raise RuntimeError(
                "DoRA magnitudes by input belong to the whole weight, of which this model has parts"
            )
        factors = rows_of(self.factors, rows)
        if factors is None:  # LoKr: made whole, then cut
            delta = self.delta(self.factors, weight.device)
            assert delta is not None
            factors = {
                "diff": delta[rows],
                **({DORA: self.factors[DORA][rows]} if DORA in self.factors else {}),
            }
        return replace(self, factors=factors)

    def add_to(self, total: Tensor, block: slice | None, weight: Tensor) -> None:
        """Add the change to a sum over some rows of the parameter, float32.

        block: which rows; None: all. weight: these rows of the parameter before any change.
        """
        if self.rows is not None:
            start = 0 if block is None else block.start
            begin, end = max(start, self.rows.start), min(start + len(total), self.rows.stop)
            if begin >= end:
                return
            block, total = (
                slice(begin - self.rows.start, end - self.rows.start),
                total[begin - start : end - start],
            )
            weight = weight[begin - start : end - start]
        # LoKr comes whole, see `_blocks`
        factors = (None if block is None else rows_of(self.factors, block)) or self.factors
        delta = self.delta(factors, total.device)
        assert delta is not None
        if self.decomposes:
            delta = decompose(weight, delta, factors[DORA])
        total.add_(delta.reshape(total.shape), alpha=self.use.multiplier)

    @property
    def decomposes(self) -> bool:
        """Whether this is a change by DoRA, which depends on the weight."""
        return DORA in self.factors and self.delta is weight_delta

    def _height(self) -> int:
        """Rows of the whole change."""
        delta = self.delta({part: t for part, t in self.factors.items() if part != "alpha"}, _META)
        assert delta is not None
        return len(delta)


class LoraPatch:
    """Adds LoRAs to weights that it is handed by name: `patch(name, weight) -> weight`, a `WeightPatch`.

    W + multiplier * (alpha / rank) * up @ down, summed in float32 on the weight's device, rounded once to the
    weight's dtype. DoRA gives multiplier * (new weight - W); the changes of several files all start from W.
    After loading, `check()` tells what found no weight.
    """

    def __init__(
        self, uses: Sequence[LoraUse], parameter_names: Iterable[str] | None = None, model: Path | None = None
    ) -> None:
        """parameter_names: of a file in another layout than ours, such as the diffusers one. model: its file,
        for messages.
        """
        self._uses = tuple(uses)
        self._path = model
        self._model = "this model" if model is None else str(model)
        # "lora_unet_blocks_0_ffn_0.weight" -> what is added to it
        self._changes: dict[str, list[_Change]] = {}
        for use in uses:
            for module, factors in use.lora.modules().items():
                for leaf, delta in _leaves(factors).items():
                    self._changes.setdefault(f"{module}.{leaf}", []).append(_Change(use, factors, delta))
        self._seen: set[str] = set()  # keys that a weight handed over has in one layout or another
        # use -> those of its keys that change something
        self._taken: dict[int, set[str]] = {id(use): set() for use in uses}
        # use -> how many channels its first layer takes, if that is another number than the model's
        self._narrower: dict[int, str] = {}
        self._modules: dict[str, None] = {}  # of the model, as far as weights were handed over
        self._renamed = rename_modules(module_of_tensor(name)[0] for name in parameter_names or ())

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Return the changed weight, a new tensor, or `weight` if nothing changes it. Raises as `add_to`."""
        if self.touches(name):
            return self.add_to(name, weight.clone())
        self._note(name)
        return weight

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """Change the weight in place and return it; on the meta device, only compare shapes.

        Works on some rows at a time, so that memory holds no second copy. A change of the first layer for
        another number of channels is left out, which `check` tells. Raises CheckpointError if a LoRA has
        another size.
        """
        self._note(name)
        changes = []
        for key, change, relative in self._changes_of(name):
            if name.endswith(FIRST_LAYERS) and (other := other_channels(change.factors, weight)) is not None:
                self._narrower[id(change.use)] = other
                continue
            self._taken[id(change.use)].add(key)
            changes.append(_fit(change, relative, weight, name, self._model).on(weight.device))
        for rows in () if weight.is_meta else _blocks(weight, changes):
            part = weight if rows is None else weight[rows]
            total = torch.zeros(part.shape, dtype=torch.float32, device=part.device)
            for change in changes:
                change.add_to(total, rows, part)
            part.copy_(total.add_(part))
        return weight

    def touches(self, name: str) -> bool:
        """Whether a LoRA changes the parameter with this name."""
        return any(True for _ in self._changes_of(name))

    def unused(self) -> list[str]:
        """Return the parts of LoRAs without a weight so far, as `file: module.weight`."""
        return [
            f"{use.lora.path.name}: {key}"
            for use in self._uses
            for key in self._keys(use)
            if key not in self._seen
        ]

    def check(self) -> None:
        """Warn of parts of LoRAs without a weight, and of LoRAs for another model.

        Raises CheckpointError if no part of a LoRA has a weight.
        """
        self.refuse_misfits()
        family = choose_family(self._modules, LIKELY_MODEL)
        for use in self._uses:
            path, keys = use.lora.path, self._keys(use)
            missed = [key for key in keys if key not in self._seen]
            taken = self._taken[id(use)]
            if id(use) in self._narrower:
                logger.warning(f"{path}: {self._narrower[id(use)]}; the rest is used without it")
            if not taken:
                logger.warning(f"{path} changes nothing, because its patterns leave no tensor that fits")
            else:
                logger.info(f"{path}: {len(taken)} weights changed, multiplier {use.multiplier:g}")
                warn_of_other_family(use.lora, family)
                warn_of_absent(path, missed, len(keys), f"weights are not in {self._model}", family)

    def refuse_misfits(self) -> None:
        """Raise CheckpointError if no part of a LoRA has a weight."""
        for use in self._uses:
            keys = self._keys(use)
            if keys and not self._seen.intersection(keys):
                raise self._misfit(use.lora, keys, choose_family(self._modules, LIKELY_MODEL))

    def _misfit(self, lora: LoraFile, missed: Sequence[str], family: FamilyNames | None) -> CheckpointError:
        """Return the error for a model and a LoRA that have nothing in common."""
        if self._path is not None and family is None:
            return CheckpointError(
                f"{self._model} is no transformer that a LoRA could be added to: it has modules such as "
                f"{list_some(list(self._modules), 3)}.\n  Give the model's own file.",
                self._path,
            )
        made = lora.family()
        kinds = (
            ""
            if made is None or family is None or made is family
            else f" It is for {made.name}, the model is {family.name}."
        )
        return CheckpointError(
            f"{lora.path} does not fit {self._model}, which has none of its {len(missed)} weights, such as "
            f"{list_some(missed, 2)}."
            f"{kinds}\n  Give a LoRA that was trained for this model.",
            self._path or lora.path,
        )

    def _note(self, name: str) -> None:
        """Remember a weight of the model."""
        self._modules.setdefault(self._own(name)[0])
        self._seen.update(key for key, _ in self._keys_of(name))

    def _own(self, name: str) -> tuple[str, str]:
        """(module under our name, leaf) of a parameter."""
        module, leaf = module_of_tensor(name)
        return self._renamed.get(module, module), leaf

    def _keys_of(self, name: str) -> Iterator[tuple[str, Relative | None]]:
        """Names under which LoRAs change a parameter: its own, and those of its parts or of what it is part
        of in other layouts.
        """
        module, leaf = self._own(name)
        yield f"{OURS}{module}.{leaf}", None
        for relative in relatives(module):
            yield f"{OURS}{relative.name}.{leaf}", relative

    def _changes_of(self, name: str) -> Iterator[tuple[str, _Change, Relative | None]]:
        """What changes a parameter, by key, as far as the patterns keep it under its name in the file and in
        the model.
        """
        own = OURS + self._own(name)[0]
        for key, relative in self._keys_of(name):
            for change in self._changes.get(key, []):
                if change.use.keeps(change.factors, key.partition(".")[0], own):
                    yield key, change, relative

    def _keys(self, use: LoraUse) -> list[str]:
        """Return the keys of a file that the patterns keep."""
        return [
            key
            for key, changes in self._changes.items()
            for change in changes
            if change.use is use
            and (key in self._taken[id(use)] or use.keeps(change.factors, key.partition(".")[0]))
        ]


def _leaves(factors: Factors) -> Mapping[str, Callable[[Factors, torch.device], Tensor | None]]:
    """Which parameters of a module the factors change, and what makes the delta of each."""
    bias = {"diff_b", "lora_up.bias"}
    return ({"bias": bias_delta} if factors.keys() & bias else {}) | (
        {"weight": weight_delta} if factors.keys() - bias - {"alpha"} else {}
    )


def _blocks(weight: Tensor, changes: Sequence[_Change]) -> Iterator[slice | None]:
    """Yield the rows to change at a time; a single None if the weight is small or a change has no rows."""
    if not changes or not weight.numel():
        return
    step = max(1, _BLOCK_ELEMENTS * len(weight) // weight.numel()) if weight.ndim else 1
    if (
        weight.ndim == 0
        or step >= len(weight)
        or any(rows_of(change.factors, slice(0, 1)) is None for change in changes)
    ):
        yield None
        return
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def _fit(change: _Change, relative: Relative | None, weight: Tensor, name: str, model: str) -> _Change:
    """Return the change for this weight. Raises CheckpointError if the shapes differ; computes nothing."""
    path = change.use.lora.path
    try:
        change = change.placed(relative, weight)
        factors = {part: t for part, t in change.factors.items() if part != "alpha"}
        delta = change.delta(factors, _META)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: the factors for {name} do not go together ({error}).", path
        ) from error
    assert delta is not None
    found, wanted = list(delta.shape), list((weight if change.rows is None else weight[change.rows]).shape)
    if delta.numel() != math.prod(wanted) or found[:1] != wanted[:1]:
        raise CheckpointError(
            f"{path} does not fit {model}: for {name} it has {found}, the model {wanted}.\n"
            "  Give a LoRA that was trained for a model of this size.",
            path,
        )
    if change.decomposes:
        magnitudes = change.factors[DORA]
        axis = 1 if has_input_magnitudes(change.factors) else 0
        if len(wanted) < 2 or magnitudes.numel() != wanted[axis]:
            raise CheckpointError(
                f"{path} does not fit {model}: for {name} it has {magnitudes.numel()} DoRA magnitudes, the "
                f"model {wanted}.",
                path,
            )
    return change


def lora_uses(loras: LoraOptions, patterns: LoraPatternOptions | None = None) -> list[LoraUse]:
    """Read the files of `--lora_weight`; return each with its multiplier and patterns."""
    files = loras.lora_weight or ()
    includes = _per_file(files, patterns.include_patterns if patterns else None, "--include_patterns")
    excludes = _per_file(files, patterns.exclude_patterns if patterns else None, "--exclude_patterns")
    rows = zip(files, loras.multipliers(), includes, excludes, strict=True)
    return [
        LoraUse(read_lora(path, by_expert=True), multiplier, include, exclude)
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
