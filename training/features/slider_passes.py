"""Sliders of captions: at strength 1 a network acts like the positive caption, at -1 like the negative one.

Source of the target: LECO, after Gandikota et al. 2023 (Concept Sliders), arXiv 2311.12092.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contract.data import Batch, Conditions
from contract.family import Family, TextEncoder
from contract.requests import Prompt
from generation.denoise import conditions_to
from modules.devices import free_memory
from modules.errors import OptionError
from modules.text_files import parse_toml, read_text
from training.data.live import stack_texts
from training.loss import NoisyBatch
from training.targets.passes import Streams, TrainingPasses, measure_plainly

CPU = torch.device("cpu")
TEXTS = ("positive", "negative", "neutral")
NUMBERS = {"weight": 1.0, "anchor_weight": 1.0}
KEYS = (*TEXTS, "anchor", *NUMBERS)
FILE_KEYS = ("guidance", "sliders")
MOST = 100.0


@dataclass(frozen=True)
class Slider:
    """Captions of one direction."""

    positive: str
    negative: str
    neutral: str
    anchor: str | None  # whose result stays as it is at both strengths
    weight: float  # factor on the loss
    anchor_weight: float

    @property
    def texts(self) -> tuple[str, ...]:
        anchors = () if self.anchor is None else (self.anchor,)
        return (self.positive, self.negative, self.neutral, *anchors)


@dataclass(frozen=True)
class SliderFile:
    """The content of a file of --slider."""

    guidance: float  # how far the result of the neutral caption moves
    sliders: tuple[Slider, ...]

    @property
    def has_anchors(self) -> bool:
        """Return whether any slider has an anchor."""
        return any(slider.anchor is not None for slider in self.sliders)


def read_sliders(path: Path) -> SliderFile:
    """Read a file of --slider. Raises OptionError that names the file, the key and what to write."""
    place = f"--slider {path}"
    try:
        content = parse_toml(read_text(path))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{place}: it is not a TOML file ({error}). Give one with [[sliders]]: docs/targets.md shows it"
        ) from None
    _refuse_unknown(place, content, FILE_KEYS)
    tables = content.get("sliders")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise OptionError(
            f"{place}: it has no [[sliders]]. Write one table for each direction, with positive, negative "
            "and neutral"
        )
    guidance = _read_number(place, content, "guidance", 3.0)
    sliders = [
        _read_slider(f"{place}, [[sliders]] {number}", table) for number, table in enumerate(tables, 1)
    ]
    return SliderFile(guidance, tuple(sliders))


def _refuse_unknown(place: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise OptionError(f"{place}: unknown key {unknown[0]}. Use {', '.join(known)}")


def _read_slider(place: str, table: Mapping[str, Any]) -> Slider:
    _refuse_unknown(place, table, KEYS)
    for key in (*TEXTS, "anchor"):
        text = table.get(key)
        if text is None and key in TEXTS:
            raise OptionError(f'{place}: it has no {key}. Write {key} = "a caption"')
        if text is not None and not isinstance(text, str):
            raise OptionError(f'{place}: {key} = {text!r} is not a caption. Write {key} = "a caption"')
    if table["positive"] == table["negative"]:
        raise OptionError(
            f"{place}: positive and negative are equal, so there is nothing to slide between. Write two ends"
        )
    if "anchor_weight" in table and "anchor" not in table:
        raise OptionError(
            f'{place}: anchor_weight needs an anchor. Write anchor = "a caption", or leave it out'
        )
    return Slider(
        positive=table["positive"],
        negative=table["negative"],
        neutral=table["neutral"],
        anchor=table.get("anchor"),
        weight=_read_number(place, table, "weight", NUMBERS["weight"]),
        anchor_weight=_read_number(place, table, "anchor_weight", NUMBERS["anchor_weight"]),
    )


def _read_number(place: str, table: Mapping[str, Any], key: str, usual: float) -> float:
    value = table.get(key, usual)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MOST:
        raise OptionError(f"{place}: {key} = {value!r}: give a number above 0 and of at most {MOST:g}")
    return float(value)


@dataclass(frozen=True)
class SliderTarget:
    """A file of sliders with the outputs of the text encoders for its captions."""

    file: SliderFile
    encoded: Mapping[str, Conditions]  # by caption, without batch dimension, on the CPU
    variable_length: frozenset[str]  # outputs that are lists in batches

    def slider_of(self, number: int) -> Slider:
        """Return the slider of a micro-batch: they take turns."""
        return self.file.sliders[number % len(self.file.sliders)]

    def tell(self, batch: Batch, caption: str, device: torch.device) -> Batch:
        """Return a batch with a caption in place of its own."""
        tensors = dict(batch.tensors)
        for name, value in self.encoded[caption].items():
            stacked = stack_texts([value] * len(batch), name in self.variable_length)
            if isinstance(stacked, list):
                tensors[name] = [item.to(device) for item in stacked]
            else:
                tensors[name] = stacked.to(device)
        return replace(batch, tensors=tensors, captions=(caption,) * len(batch))


def slider_passes(
    target: SliderTarget,
    at_strength: Callable[[float], AbstractContextManager[None]],
    passes: TrainingPasses,
    noisy_batch: NoisyBatch,
) -> Iterator[Streams]:
    """Yield the errors of each pass with gradients: at strength 1 and -1, of the neutral caption and of an
    anchor.

    With d = b(positive) - b(negative) of the base model, G the guidance and f the network at a strength:
    1/2 |f(neutral) - (b(neutral) + strength * G * d)|^2 + anchor_weight * |f(anchor) - b(anchor)|^2, times
    the slider's weight. The strength holds until the caller has taken the gradients.
    """
    slider = target.slider_of(noisy_batch.number)

    def tell(caption: str) -> NoisyBatch:
        return replace(noisy_batch, batch=target.tell(noisy_batch.batch, caption, noisy_batch.noise.device))

    neutral = tell(slider.neutral)
    start = passes.base(neutral)
    change = passes.base(tell(slider.positive)) - passes.base(tell(slider.negative))
    anchor = anchor_target = None
    anchor_caption = slider.anchor
    anchor_weight = slider.weight * slider.anchor_weight
    if anchor_caption is None and passes.rule.in_lockstep and target.file.has_anchors:
        # another process may have a slider with an anchor just now: all run equal passes
        anchor_caption, anchor_weight = slider.neutral, 0.0
    if anchor_caption is not None:
        anchor = tell(anchor_caption)
        anchor_target = passes.base(anchor)
    for strength in (1.0, -1.0):
        with at_strength(strength):
            passes.restart(noisy_batch)
            aim = start + strength * target.file.guidance * change
            errors = measure_plainly(passes, passes.learning(neutral), aim, neutral)
            yield tuple(0.5 * slider.weight * error for error in errors)
            if anchor is None or anchor_target is None:
                continue
            passes.restart(noisy_batch)
            errors = measure_plainly(passes, passes.learning(anchor), anchor_target, anchor)
            yield tuple(anchor_weight * error for error in errors)


def encode_sliders(family: Family, file: SliderFile, device: torch.device) -> SliderTarget:
    """Encode all captions of a file, one encoder after the other.

    Raises OptionError if a text encoder is not given.
    """
    family.check_files(media=False)
    texts = list(dict.fromkeys(text for slider in file.sliders for text in slider.texts))
    encoded: dict[str, dict[str, Tensor | list[Tensor]]] = {text: {} for text in texts}
    variable: set[str] = set()
    for encoder in family.text_encoders():
        variable |= encoder.variable_length
        for text, conditions in zip(texts, _encode(encoder, texts, device), strict=True):
            encoded[text] |= conditions
    return SliderTarget(file, encoded, frozenset(variable))


def _encode(encoder: TextEncoder, texts: Sequence[str], device: torch.device) -> Iterator[Conditions]:
    """Yield the outputs of an encoder for each text, on the CPU."""
    try:
        encoder.load(device)
        for text in texts:
            with torch.no_grad():
                (conditions,) = encoder.encode([Prompt(text)])
            yield conditions_to(conditions, CPU)
    finally:
        encoder.free()
        free_memory(device)
