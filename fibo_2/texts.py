"""The text encoder: captions as the model reads them, and states of several layers of Qwen3-VL."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.language_encoder import LanguageEncoderSettings, LanguageModelEncoder, qwen_tokenizer
from encoders.language_models import QWEN3_VL
from encoders.picture_prompts import ImagePromptFormat
from encoders.text_encoder import TemplatedPrompt
from fibo_2.captions import (
    INSTRUCTION,
    TEXTS,
    WrittenCaption,
    find_caption_errors,
    list_drawn_texts,
    read_caption,
    write_caption,
    write_edit,
    write_json,
)
from fibo_2.configs import STATES
from fibo_2.drawn_texts import draw_text, find_undrawable, read_fonts
from fibo_2.references import read_encoder_image, shrink
from krea2.files import BESIDE
from modules.control_codes import shorten
from modules.text_files import looks_like_object
from protocols.data import Conditions
from protocols.requests import Prompt, Spans

logger = logging.getLogger(__name__)

KEY = "fibo_states"
# states of a caption whose texts the encoder also sees as drawings; of length 0 if there is nothing to draw
DRAWN_KEY = "fibo_drawn_states"
MAX_TOKENS = 4096  # maximum length of a prompt with its template; the rest is cut off, as in the release
EPS = 1e-6  # epsilon of the normalization of states
_SOURCE = qwen_tokenizer("--text_encoder_tokenizer", "Qwen/Qwen3-VL-4B-Instruct")
_SEEN = '"image{name}":"<|vision_start|>{{tokens}}<|vision_end|>",'
_BEFORE, _PLACEHOLDER, _AFTER = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_MARK = f"{_BEFORE}{_PLACEHOLDER}{_AFTER}"  # where a drawing belongs


ENCODER_SETTINGS = LanguageEncoderSettings(
    name="qwen3_vl",
    states_key=KEY,
    model=QWEN3_VL,
    source=replace(
        _SOURCE, files=replace(_SOURCE.files, folder="", folders=(*BESIDE, "processor", "../processor"))
    ),
    max_length=MAX_TOKENS,
    template_prefix="<|im_start|>user\n",
    template_suffix="<|im_end|>\n<|im_start|>assistant\n",
    stacked_states=STATES,
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
    image_format=ImagePromptFormat(
        _SEEN.format(name="_{number}"),
        alone=_SEEN.format(name=""),
        read=read_encoder_image,
        show=shrink,
        min_pixels=3136,
        max_pixels=1_605_632,  # limits of this release, which differ from those of Qwen3-VL
        loads_tower_at_once=False,
    ),
)


@dataclass(frozen=True)
class _DrawnPrompt(Prompt):
    """A prompt of a generation whose texts the encoder also sees as drawings."""


class Fibo2TextEncoder(LanguageModelEncoder):
    """Qwen3-VL for JSON captions; each layer's states are scaled to a root mean square of 1 per token.

    The encoder sees the texts of `text_render` also as drawings: those of an edit always, those of a
    generation in states of their own (`DRAWN_KEY`), which the network reads from a noise level on.
    """

    def __init__(
        self,
        use: LanguageEncoderSettings,
        path: Path,
        *settings: Any,
        draws_texts: bool = True,
        font_paths: Sequence[Path] = (),
        **named_settings: Any,
    ) -> None:
        """Set up the encoder; files of the model are read by `load`, fonts at once.

        Args:
            use: How the family uses the model.
            path: File or folder of Qwen3-VL.
            *settings: Further arguments of `LanguageModelEncoder`.
            draws_texts: Whether texts are drawn.
            font_paths: Fonts for characters that Pillow's own font lacks.
            **named_settings: Further arguments of `LanguageModelEncoder`.

        Raises:
            OptionError: If a font cannot be read.
        """
        super().__init__(use, path, *settings, **named_settings)
        self.draws_texts = draws_texts
        self._font_paths = tuple(font_paths)
        self._fonts = read_fonts(font_paths)
        if draws_texts:
            self.keys |= {DRAWN_KEY}
            self.variable_length |= {DRAWN_KEY}
        self._has_logged_plain_text = False  # whether it was logged how plain texts are encoded
        self._has_warned = False  # whether a warning about texts that are not drawn has been logged
        self._logged_errors: set[str] = set()  # in keys of captions
        self._long_prompts: set[str] = set()  # whose texts are not drawn

    @property
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: also whether texts are drawn, and with which fonts."""
        if not self.draws_texts:
            return super().identity
        names = ", ".join(path.name for path in self._font_paths)
        return {**super().identity, f"{self.name}_drawn_texts": names or "with Pillow's font"}

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Insert a caption or prompt as JSON into the template; a negative prompt is not turned into JSON.

        Raises CaptionError for invalid JSON, and for the JSON of an edit without an instruction.
        """
        if prompt.is_negative:
            return super().apply_template(prompt)
        write = write_edit if prompt.images else write_caption
        caption = unmarked = write(prompt.text)
        if self._list_drawn(prompt):
            unmarked = write(prompt.text, "")
            caption = write(prompt.text, _MARK) if _shows_drawings(prompt) else unmarked
        templated = super().apply_template(Prompt(caption.text, weighted_spans=_move_spans(prompt, caption)))
        templated = templated._replace(prompt=unmarked.text)  # in which only the user's own marks are found
        if not prompt.images:
            return templated
        # the JSON's opening brace belongs before the image placeholders, so the text positions shift by one
        start = templated.start
        return templated._replace(
            text=f"{templated.text[:start]}{{{templated.text[start:]}",
            start=start + 1,
            suffix_start=templated.suffix_start + 1,
        )

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return each prompt's states; log plain texts, and JSON keys that the model does not know."""
        for prompt in prompts:  # not in `write`, which also counts tokens, of captions without their images
            if not prompt.is_negative:
                # Log once whether a prompt is in the JSON format of the training data, or how it differs
                text, is_edit = prompt.text, bool(prompt.images)
                if looks_like_object(text):
                    self._warn_of_oddities(text, is_edit)
                elif text.strip() and not self._has_logged_plain_text:
                    self._has_logged_plain_text = True
                    written = f"{{{write_edit(text).text}" if is_edit else write_caption(text).text
                    message = "plain texts are encoded as JSON, which the model was trained on, such as %s"
                    logger.info(message, shorten(written, 120))
        if not self.draws_texts:
            self._warn_of_words(prompts)
            return super().encode(prompts)
        self._find_long(prompts)
        results = super().encode(prompts)
        drawn = [
            _DrawnPrompt(**vars(prompt)) if self._list_drawn(prompt) and not prompt.images else None
            for prompt in prompts
        ]
        states = iter(super().encode([prompt for prompt in drawn if prompt is not None]))
        return [
            {**result, DRAWN_KEY: next(states)[KEY] if prompt else [result[KEY][0][:0]]}
            for result, prompt in zip(results, drawn, strict=True)
        ]

    def _list_drawn(self, prompt: Prompt) -> list[str]:
        """Return the texts of a prompt that are drawn."""
        if prompt.is_negative or not self.draws_texts or prompt.text in self._long_prompts:
            return []
        return list_drawn_texts(prompt.text) if looks_like_object(prompt.text) else []

    def _find_long(self, prompts: Sequence[Prompt]) -> None:
        """Find the prompts that are cut off, which may cut off the place of a drawing: nothing is drawn."""
        _, tokenizer = self._loaded.get()
        for prompt in prompts:
            if self._list_drawn(prompt):
                marked = self.apply_template(_DrawnPrompt(**vars(prompt)))
                if len(tokenizer.read(marked.text).ids) > MAX_TOKENS:
                    self._long_prompts.add(prompt.text)
                    logger.warning(
                        "%s is longer than %d tokens, so none of its texts is drawn for the text encoder",
                        shorten(prompt.text, 60),
                        MAX_TOKENS,
                    )

    def _warn_of_words(self, prompts: Sequence[Prompt]) -> None:
        """Warn once that the encoder reads only the words of texts in the image."""
        for prompt in prompts:
            is_json = not prompt.is_negative and looks_like_object(prompt.text)
            if is_json and not self._has_warned and list_drawn_texts(prompt.text):
                self._has_warned = True
                logger.warning(
                    "%s of %s: with --no_text_images the text encoder reads only the words and sees no "
                    "drawings of them, so letters are less reliable",
                    TEXTS,
                    shorten(prompt.text, 60),
                )

    def read_frames(self, prompt: Prompt) -> list[Tensor]:
        """Return the images to edit as the model sees them, then the drawings of texts."""
        frames = super().read_frames(prompt)
        if not _shows_drawings(prompt):
            return frames
        texts = self._list_drawn(prompt)
        missing = find_undrawable("".join(texts), self._fonts)
        if missing and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s of %s: no font here has %s, so an empty box is drawn. Pass the fonts of the release to "
                "--fonts",
                TEXTS,
                shorten(prompt.text, 60),
                shorten(missing, 20),
            )
        return frames + [draw_text(text, self._fonts) for text in texts]

    def place_images(
        self, prompt: Prompt, templated: TemplatedPrompt, counts: Sequence[int]
    ) -> TemplatedPrompt:
        """Return a prompt with the tokens of images to edit in front, and of drawings at their texts."""
        num_edited = len(prompt.image_pixels or prompt.images)
        text = templated.text
        end = templated.start
        for num_tokens in counts[num_edited:]:
            drawing = f"{_BEFORE}{_PLACEHOLDER * num_tokens}{_AFTER}"
            position = text.index(_MARK, end)
            text = text[:position] + drawing + text[position + len(_MARK) :]
            end = position + len(drawing)
        return super().place_images(prompt, templated._replace(text=text), counts[:num_edited])

    def _warn_of_oddities(self, text: str, is_edit: bool) -> None:
        """Warn once about each unusual key of a JSON prompt and about each part without effect."""
        new = [error for error in _list_oddities(text, is_edit) if error not in self._logged_errors]
        self._logged_errors.update(new)
        if new:
            message = "%s, which differs from the captions that the model was trained on: %s"
            logger.warning(message, shorten(text, 60), "; ".join(new))

    def compute(self, *inputs: Any, **named_inputs: Any) -> list[Conditions]:
        """Return each prompt's states, divided by their root mean square per token."""
        results: list[Conditions] = []
        for conditions in super().compute(*inputs, **named_inputs):
            states: Sequence[Tensor] = conditions[KEY]  # type: ignore[assignment]
            results.append({**conditions, KEY: [scale_states(one) for one in states]})
        return results


def _shows_drawings(prompt: Prompt) -> bool:
    """Return whether the encoder sees the drawings of a prompt's texts in this pass."""
    return bool(prompt.images) or isinstance(prompt, _DrawnPrompt)


def _list_oddities(text: str, is_edit: bool) -> list[str]:
    """Return a JSON prompt's unusual keys, and its parts that have no effect."""
    content = read_caption(text) or {}
    errors = find_caption_errors(text)
    if content.get(INSTRUCTION) and not is_edit:
        errors.append(f"{INSTRUCTION} is left out, as there is no image to edit")
    return errors


def scale_states(states: Tensor) -> Tensor:
    """Divide states, T n W, by their root mean square, in float32."""
    wide = states.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)).to(states.dtype)


def _move_spans(prompt: Prompt, caption: WrittenCaption) -> Spans:
    """Return a prompt's weighted spans at their positions in the caption that the encoder gets."""
    # If a JSON prompt was rewritten, they are dropped with a warning.
    if not prompt.weighted_spans or caption.text == prompt.text:
        return prompt.weighted_spans
    if not caption.is_plain:
        logger.warning(
            "the weights of parts of %s are ignored because its JSON was rewritten for the model, without "
            "empty values, scores and white space between its parts",
            shorten(prompt.text, 60),
        )
        return ()
    moved_spans = []
    for start, end, weight in prompt.weighted_spans:
        # escaping in JSON lengthens the text, so measure the written prefix, without its two quotes
        new_start, new_end = (
            len(caption.before) + len(write_json(prompt.text[:position])) - 2 for position in (start, end)
        )
        moved_spans.append((new_start, new_end, weight))
    return tuple(moved_spans)
