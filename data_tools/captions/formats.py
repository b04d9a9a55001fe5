"""Captions that are JSON objects: the question for them, what an answer is, and words put into its texts."""

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
from data_tools.captions.places import CaptionPlace
from dataset.sources.captions import add_trigger
from modules.control_codes import shorten
from modules.text_files import looks_like_object, read_object
from protocols.caption_formats import CaptionFormat

logger = logging.getLogger(__name__)

TIMES = 2  # that a model is asked for an object
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
    """Ask a model for captions that are JSON objects, and check its answers.

    `prompt` is an additional request; None stands for the default sentence. With `tells_plain`, the question
    contains an existing caption that is plain text, so that the model turns it into an object.
    """

    format: CaptionFormat
    wording: WordingOptions
    prompt: str | None
    tells_plain: bool
    unsaid: Counter[str] = field(default_factory=Counter)  # keys that answers left out

    def make_question(self, place: CaptionPlace) -> str:
        """Return the model's prompt for an image or clip: the request, and a line about each JSON key."""
        what = "this image" if place.source.table.kind == "image" else "the video of these frames"
        lines = [self.prompt or _QUESTION.format(what=what)]
        for key in self.format.keys:
            parts = ", ".join(f'"{part}"' for part in key.parts)
            lines.append(f'"{key.name}": {key.about}; {_OF_KIND[key.kind].format(parts=parts)}')
        caption = place.caption
        if self.tells_plain and caption and not looks_like_object(caption):
            lines.append(_KNOWN.format(caption=" ".join(caption.split())))
        return "\n".join(lines)

    def read_answer(self, answer: str) -> str:
        """Return the JSON caption in an answer, with the trigger word, prefix and suffix of the options.

        Raises:
            NoCaptionError: If the answer has no JSON object, or an object in a form that the model was not
                trained with.
        """
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
        """Wrap an answerer so that its captions are checked; an invalid answer is requested once more."""

        def answer(places: Sequence[CaptionPlace], look: Look) -> Answers:
            # the place with its question -> the place as the caller knows it
            questions = {
                dataclasses.replace(place, question=self.make_question(place)): place for place in places
            }
            for attempt in range(1, TIMES + 1):
                again: dict[CaptionPlace, CaptionPlace] = {}  # questions of the next attempt
                with contextlib.closing(answerer(list(questions), look)) as answers:
                    for with_question, text in answers:
                        place = questions[with_question]
                        try:
                            yield place, self.read_answer(text) if isinstance(text, str) else text
                        except NoCaptionError as error:
                            if attempt == TIMES:
                                yield place, NoCaptionError(f"{attempt} answers are wrong, the last: {error}")
                                continue
                            logger.warning("%s: %s. It is asked again", place.media, error)
                            wrong = _WRONG.format(fault=error)
                            question = f"{with_question.question}\n{wrong}"
                            again[dataclasses.replace(with_question, question=question)] = place
                questions = again

        return answer

    def describe_unsaid(self) -> str | None:
        """Return how often which keys were left out, in a line; None if none was."""
        counts = ", ".join(f"{name} in {count}" for name, count in self.unsaid.most_common())
        return counts or None


def write_object(caption: dict[str, Any]) -> str:
    """Return a caption that is a JSON object as one line of text."""
    return json.dumps(caption, ensure_ascii=False)


def reword_object(caption: dict[str, Any], wording: WordingOptions, main: str) -> dict[str, Any]:
    """Apply replacements to all texts of a JSON caption, and put words around the text of its key `main`."""
    replacements = dataclasses.replace(wording, trigger_word="", caption_prefix="", caption_suffix="")

    def reword_value(value: Any) -> Any:
        if isinstance(value, str):
            return reword(value, replacements)
        if isinstance(value, list):
            return [reword_value(part) for part in value]
        if isinstance(value, dict):
            return {name: reword_value(part) for name, part in value.items()}
        return value

    reworded: dict[str, Any] = reword_value(caption) if wording.replace or wording.replace_regex else caption
    words_around = dataclasses.replace(wording, replace=(), replace_regex=())
    if not words_around.changes_something:
        return reworded
    full = write_object(reworded)
    # a trigger word that some text of the object has already is not added again
    if add_trigger(full, wording.trigger_word.strip()) == full:
        words_around = dataclasses.replace(words_around, trigger_word="")
    # the main text comes first if the object has none
    return {main: "", **reworded} | {main: reword(str(reworded.get(main) or ""), words_around)}
