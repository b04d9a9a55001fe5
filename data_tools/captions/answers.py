"""The contract of makers of captions: they get frames, and answer with a text or a reason."""

from collections.abc import Callable, Generator, Sequence

from data_tools.captions.options import AskOptions
from data_tools.captions.planning import CaptionJob
from data_tools.captions.wording import clean_answer
from modules.media.reading import Frame

Frames = tuple[Frame, ...]  # each H W 3
Look = Callable[[CaptionJob], Frames]
# the caption, or why there is none; other errors end the run
Answer = tuple[CaptionJob, str | Exception]
Answers = Generator[Answer, None, None]
Answerer = Callable[[Sequence[CaptionJob], Look], Answers]

PROMPTS = {
    "image": "Describe this image in one paragraph of plain English, for a model that learns to make images "
    "from text: who or what is seen and how it looks, what happens, the surroundings, the light and the "
    "style. Begin with the subject. Say nothing that is not seen, and answer with the description alone.",
    "video": "These are frames of one video, in order. Describe the video in one paragraph of plain English, "
    "for a model that learns to make videos from text: who or what is seen and how it looks, what it does "
    "from beginning to end, the surroundings, how the camera moves, the light and the style. Begin with the "
    "subject. Say nothing that is not seen, do not mention frames, and answer with the description alone.",
}


class NoCaptionError(Exception):
    """An image or clip for which no caption was made, and why. The run goes on with the others."""

    def __init__(self, reason: str, server_failed: bool = False) -> None:
        """server_failed: the server did not answer, again and again."""
        super().__init__(reason)
        self.server_failed = server_failed


def prompt_for(job: CaptionJob, ask: AskOptions) -> str:
    """Return the question about an image or a clip."""
    return ask.prompt if ask.prompt is not None else PROMPTS[job.place.source.table.kind]


def caption_in(answer: str, was_cut: bool) -> str:
    """Return the caption in an answer. Raises NoCaptionError if it is empty.

    was_cut: the answer was ended by --max_new_tokens.
    """
    caption = clean_answer(answer)
    if not caption:
        why = ", and --max_new_tokens ended it: raise that" if was_cut else ""
        raise NoCaptionError(f"the model's answer holds no text{why}")
    return caption
