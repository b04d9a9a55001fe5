"""Captions that are JSON objects: ask a model for them, check its answers, and reword their text values."""

import contextlib
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_tools.captions.asking import (
    Captioner,
    CaptionResults,
    NoCaptionError,
    ReadFrames,
    WordingOptions,
    reword,
)
from data_tools.captions.places import CaptionLocation
from dataset.sources.captions import add_trigger
from modules.control_codes import shorten
from modules.text_files import looks_like_object, read_object
from protocols.caption_formats import CaptionFormat

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # maximum number of times that a model is asked for the same object
SHOWN = 200  # characters of an answer in a message
_DEFAULT_PROMPT = (
    "Describe {what} as one JSON object, for a model that learns to make pictures from such objects. Say "
    "nothing that is not seen, omit what does not apply, and answer with the object alone. Its keys:"
)
_TYPE_DESCRIPTIONS: dict[type, str] = {
    str: "a text",
    dict: "an object with the texts {parts}",
    list: "a list of objects with {parts}",
}
_EXISTING_CAPTION = "What is known already, and has to be said in the object too: {caption}"
_CORRECTION = "Your last answer was wrong: {fault}. Write the whole object again, without this mistake."


@dataclass
class JsonCaptioner:
    """Asks a model for JSON captions, and checks its answers."""

    format: CaptionFormat
    wording: WordingOptions
    prompt: str | None  # the request before the list of keys; None: the default request
    # whether the prompt contains an existing caption that is plain text, to convert it to an object
    includes_plain_caption: bool
    missing_keys: Counter[str] = field(default_factory=Counter)  # number of answers that lack a key, by key

    def make_prompt(self, location: CaptionLocation) -> str:
        """Return the prompt for an image or clip, with a line about each of the JSON keys in the format."""
        subject = "this image" if location.source.table.kind == "image" else "the video of these frames"
        lines = [self.prompt or _DEFAULT_PROMPT.format(what=subject)]
        for key in self.format.keys:
            parts = ", ".join(f'"{part}"' for part in key.parts)
            value_type = _TYPE_DESCRIPTIONS[key.kind].format(parts=parts)
            lines.append(f'"{key.name}": {key.about}; {value_type}')
        caption = location.caption
        if self.includes_plain_caption and caption and not looks_like_object(caption):
            lines.append(_EXISTING_CAPTION.format(caption=" ".join(caption.split())))
        return "\n".join(lines)

    def parse_answer(self, answer: str) -> str:
        """Extract the JSON caption from a model's answer, and apply the wording options to it.

        Raises:
            NoCaptionError: If the answer has no JSON object, or an object in a form that the model was not
                trained with.
        """
        # models may write text around the object
        start, end = answer.find("{"), answer.rfind("}")
        if start < 0 or end < start:
            hint = "" if start < 0 else ", as it does not end: raise --max_new_tokens"
            raise NoCaptionError(f"the answer contains no JSON object{hint}: {shorten(answer, SHOWN)!r}")
        try:
            caption = read_object(answer[start : end + 1])
        except ValueError as error:
            raise NoCaptionError(f"{error}: {shorten(answer[start:], SHOWN)!r}") from None
        errors = self.format.find_errors(caption)
        if errors:
            raise NoCaptionError("; ".join(errors))
        self.missing_keys.update(self.format.list_unsaid(caption))
        return write_object(reword_object(caption, self.wording, self.format.main))

    def wrap_captioner(self, captioner: Captioner) -> Captioner:
        """Return a captioner that checks JSON captions, and repeats the requests for invalid ones."""
        return partial(self._caption_as_json, captioner)

    def _caption_as_json(
        self, captioner: Captioner, locations: Sequence[CaptionLocation], read_frames: ReadFrames
    ) -> CaptionResults:
        """Yield (location, JSON caption or error) for each location."""
        # If an answer is not valid, the request is repeated with the error, up to MAX_ATTEMPTS times.
        # location with the prompt of its next request -> location as the caller passed it
        pending = {
            dataclasses.replace(location, prompt=self.make_prompt(location)): location
            for location in locations
        }
        for attempt in range(1, MAX_ATTEMPTS + 1):
            retries: dict[CaptionLocation, CaptionLocation] = {}
            with contextlib.closing(captioner(list(pending), read_frames)) as answers:
                for prompted_location, answer in answers:
                    location = pending[prompted_location]
                    if isinstance(answer, Exception):
                        yield location, answer
                        continue
                    # the caption in the answer, or the error if it is not valid
                    caption: str | NoCaptionError
                    try:
                        caption = self.parse_answer(answer)
                    except NoCaptionError as error:
                        caption = error
                    if isinstance(caption, str):
                        yield location, caption
                    elif attempt < MAX_ATTEMPTS:
                        logger.warning("%s: %s. Asking again", location.display_path, caption)
                        # the next prompt says what was wrong with this answer
                        prompt = f"{prompted_location.prompt}\n{_CORRECTION.format(fault=caption)}"
                        retries[dataclasses.replace(prompted_location, prompt=prompt)] = location
                    else:
                        text = f"{attempt} answers are wrong, the last: {caption}"
                        yield location, NoCaptionError(text)
            pending = retries

    def describe_missing_keys(self) -> str | None:
        """Return the JSON keys that answers lacked, with counts, as text; None if no key was missing."""
        counts = ", ".join(f"{name} in {count}" for name, count in self.missing_keys.most_common())
        return counts or None


def write_object(caption: dict[str, Any]) -> str:
    """Serialize a JSON caption in one line."""
    return json.dumps(caption, ensure_ascii=False)


def reword_object(caption: dict[str, Any], wording: WordingOptions, main: str) -> dict[str, Any]:
    """Apply the wording options to a JSON caption.

    Replacements apply to all its strings; trigger word, prefix and suffix are put around the string under the
    key `main`.
    """
    if wording.replace or wording.replace_regex:
        replacements = dataclasses.replace(wording, trigger_word="", caption_prefix="", caption_suffix="")
        caption = _reword_texts(caption, replacements)
    # trigger word, prefix and suffix
    additions = dataclasses.replace(wording, replace=(), replace_regex=())
    if not additions.changes_something:
        return caption
    json_text = write_object(caption)
    has_trigger_word = add_trigger(json_text, wording.trigger_word.strip()) == json_text
    if has_trigger_word:
        additions = dataclasses.replace(additions, trigger_word="")
    main_text = reword(str(caption.get(main) or ""), additions)
    # the key keeps its position; if the object lacks it, it comes first
    return {main: "", **caption} | {main: main_text}


def _reword_texts(value: Any, wording: WordingOptions) -> Any:
    """Return a JSON value with all its strings reworded, at any depth."""
    if isinstance(value, str):
        return reword(value, wording)
    if isinstance(value, list):
        return [_reword_texts(part, wording) for part in value]
    if isinstance(value, dict):
        return {name: _reword_texts(part, wording) for name, part in value.items()}
    return value
