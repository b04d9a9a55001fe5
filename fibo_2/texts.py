"""The text encoder: captions as the model reads them, and states of several layers of Qwen3-VL."""

import logging
from collections.abc import Sequence
from dataclasses import replace
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
    has_drawn_texts,
    read_caption,
    write_caption,
    write_edit,
    write_json,
)
from fibo_2.configs import STATES
from fibo_2.references import read_encoder_image, shrink
from krea2.files import BESIDE
from modules.control_codes import shorten
from modules.text_files import looks_like_object
from protocols.data import Conditions
from protocols.requests import Prompt, Spans

logger = logging.getLogger(__name__)

KEY = "fibo_states"
MAX_TOKENS = 4096  # maximum length of a prompt with its template; the rest is cut off, as in the release
EPS = 1e-6  # epsilon of the normalization of states
_SOURCE = qwen_tokenizer("--text_encoder_tokenizer", "Qwen/Qwen3-VL-4B-Instruct")
_SEEN = '"image{name}":"<|vision_start|>{{tokens}}<|vision_end|>",'


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


class Fibo2TextEncoder(LanguageModelEncoder):
    """Qwen3-VL for JSON captions; each layer's states are scaled to a root mean square of 1 per token."""

    def __init__(
        self, use: LanguageEncoderSettings, path: Path, *settings: Any, **named_settings: Any
    ) -> None:
        super().__init__(use, path, *settings, **named_settings)
        self._has_logged_plain_text = False  # whether it was logged how plain texts are encoded
        self._has_warned = False  # whether a warning about texts that are not drawn has been logged
        self._logged_errors: set[str] = set()  # in keys of captions

    def apply_template(self, prompt: Prompt) -> TemplatedPrompt:
        """Insert a caption or prompt as JSON into the template; a negative prompt is not turned into JSON.

        Raises CaptionError for invalid JSON, and for the JSON of an edit without an instruction.
        """
        if prompt.is_negative:
            return super().apply_template(prompt)
        caption = write_edit(prompt.text) if prompt.images else write_caption(prompt.text)
        # only JSON can say which texts the image shows
        if not (caption.is_plain or self._has_warned) and has_drawn_texts(prompt.text):
            self._has_warned = True
            logger.warning(
                "%s of %s: the release's pipeline also shows drawings of these texts to the text encoder; "
                "here it reads only the words, so letters are less reliable",
                TEXTS,
                shorten(prompt.text, 60),
            )
        templated = super().apply_template(Prompt(caption.text, weighted_spans=_move_spans(prompt, caption)))
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
        return super().encode(prompts)

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
