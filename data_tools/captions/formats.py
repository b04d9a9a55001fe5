"""Captions that are JSON objects: ask a model for them, check its answers, and change their texts."""

import contextlib
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.captions.asking import Answerer, Answers, Look, NoCaptionError, reword
from data_tools.captions.options import WordingOptions
from data_tools.captions.places import CaptionLocation
from dataset.sources.captions import add_trigger
from modules.control_codes import shorten
from modules.text_files import looks_like_object, read_object
from protocols.caption_formats import CaptionFormat

logger = logging.getLogger(__name__)

TIMES = 2  # maximum number of times that a model is asked for the same object
SHOWN = 200  # characters of an answer in a message
_QUESTION = (
    "Describe {what} as one JSON object, for a model that learns to make pictures from such objects. Say "
    "nothing that is not seen, leave out what does not apply, and answer with the object alone. Its keys:"
)
_OF_KIND: dict[type, str] = {
    str: "a text",
    dict: "an object with the texts {parts}",
    list: "a list of objects with {parts}",
}
_KNOWN = "What is known already, and has to be said in the object too: {caption}"
_WRONG = "Your last answer was wrong: {fault}. Write the whole object again, without this mistake."


@dataclass
class ObjectAsker:
    """Asks a model for JSON captions, and checks its answers."""

    format: CaptionFormat
    wording: WordingOptions
    prompt: str | None  # the request before the list of keys; None: the default sentence
    # whether the question contains an existing caption that is plain text, to convert it to an object
    tells_plain: bool
    unsaid: Counter[str] = field(default_factory=Counter)  # number of answers that lack a key, by key

    def make_question(self, location: CaptionLocation) -> str:
        """Return the prompt for an image or clip: the request, with a line about each JSON key."""
        what = "this image" if location.source.table.kind == "image" else "the video of these frames"
        lines = [self.prompt or _QUESTION.format(what=what)]
        for key in self.format.keys:
            parts = ", ".join(f'"{part}"' for part in key.parts)
            lines.append(f'"{key.name}": {key.about}; {_OF_KIND[key.kind].format(parts=parts)}')
        caption = location.caption
        if self.tells_plain and caption and not looks_like_object(caption):
            lines.append(_KNOWN.format(caption=" ".join(caption.split())))
        return "\n".join(lines)

    def read_answer(self, answer: str) -> str:
        """Extract the JSON caption from a model's answer, and apply the wording options to it.

        Raises:
            NoCaptionError: If the answer has no JSON object, or an object in a form that the model was not
                trained with.
        """
        # models may write text around the object
        start, end = answer.find("{"), answer.rfind("}")
        if start < 0 or end < start:
            hint = "" if start < 0 else ", as it does not end: raise --max_new_tokens"
            raise NoCaptionError(f"the answer holds no JSON object{hint}: {shorten(answer, SHOWN)!r}")
        try:
            caption = read_object(answer[start : end + 1])
        except ValueError as error:
            raise NoCaptionError(f"{error}: {shorten(answer[start:], SHOWN)!r}") from None
        errors = self.format.find_errors(caption)
        if errors:
            raise NoCaptionError("; ".join(errors))
        self.unsaid.update(self.format.list_unsaid(caption))
        return write_object(reword_object(caption, self.wording, self.format.main))

    def around(self, answerer: Answerer) -> Answerer:
        """Wrap an answerer so that its JSON captions are checked, and asked for again if they are invalid."""

        def answer(locations: Sequence[CaptionLocation], look: Look) -> Answers:
            """Yield (location, caption or error) for each location; ask again if an answer is not valid."""
            # location with its question -> location as the caller knows it
            questions = {
                dataclasses.replace(location, question=self.make_question(location)): location
                for location in locations
            }
            for attempt in range(1, TIMES + 1):
                again: dict[CaptionLocation, CaptionLocation] = {}  # questions of the next attempt
                with contextlib.closing(answerer(list(questions), look)) as answers:
                    for with_question, text in answers:
                        location = questions[with_question]
                        try:
                            result = self.read_answer(text) if isinstance(text, str) else text
                        except NoCaptionError as error:
                            if attempt < TIMES:
                                logger.warning("%s: %s. It is asked again", location.media, error)
                                again[_add_error(with_question, error)] = location
                                continue
                            result = NoCaptionError(f"{attempt} answers are wrong, the last: {error}")
                        yield location, result
                questions = again

        return answer

    def describe_unsaid(self) -> str | None:
        """Return each key that answers lacked, with its number of answers; None if no key was missing."""
        counts = ", ".join(f"{name} in {count}" for name, count in self.unsaid.most_common())
        return counts or None


def _add_error(location: CaptionLocation, error: NoCaptionError) -> CaptionLocation:
    """Return the location with a prompt that also explains the error in the last answer."""
    return dataclasses.replace(location, question=f"{location.question}\n{_WRONG.format(fault=error)}")


def write_object(caption: dict[str, Any]) -> str:
    """Serialize a JSON caption in one line."""
    return json.dumps(caption, ensure_ascii=False)


def reword_object(caption: dict[str, Any], wording: WordingOptions, main: str) -> dict[str, Any]:
    """Apply the wording options to a JSON caption.

    Replacements apply to all its texts; trigger word, prefix and suffix are put around the text of its key
    `main`.
    """
    replacements = dataclasses.replace(wording, trigger_word="", caption_prefix="", caption_suffix="")

    def reword_value(value: Any) -> Any:
        """Reword all texts in a JSON value, at any depth."""
        if isinstance(value, str):
            return reword(value, replacements)
        if isinstance(value, list):
            return [reword_value(part) for part in value]
        if isinstance(value, dict):
            return {name: reword_value(part) for name, part in value.items()}
        return value

    reworded = caption
    if wording.replace or wording.replace_regex:
        reworded = reword_value(caption)
    # what is added around the main text: trigger word, prefix and suffix
    additions = dataclasses.replace(wording, replace=(), replace_regex=())
    if not additions.changes_something:
        return reworded
    full = write_object(reworded)
    # a trigger word that any text of the object contains is not added again
    if add_trigger(full, wording.trigger_word.strip()) == full:
        additions = dataclasses.replace(additions, trigger_word="")
    main_text = reword(str(reworded.get(main) or ""), additions)
    # the key keeps its position; if the object lacks it, it comes first
    return {main: "", **reworded} | {main: main_text}
