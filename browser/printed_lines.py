"""Translate the common lines that `new` prints and that a training logs.

Programs print English. A line in one of the forms listed here is shown translated, with its names and
numbers; any other line is shown as it was printed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from modules.pages.language import Words, join, say
from training.reports.history import PageCommand

# of forms that fit one line, the first counts
LINES = (
    say("%(folder)s: %(media)s. %(model)s at %(size)s, %(frames)s frames, on %(card)s"),
    say("%(folder)s: %(media)s. %(model)s at %(size)s, on %(card)s"),
    say("%(names)s: tiny, below %(pixels)s pixels: their blur is learned"),
    say(
        "%(size)s: the size of a typical file, %(file)s. Every file keeps its own shape, at this area "
        "(resolution in dataset.toml)"
    ),
    say("%(model)s makes %(media)s; %(files)s. %(fit)s"),
    say(
        "%(names)s: without a caption in a %(suffix)s file next to it, which `run` refuses. A model "
        "(%(model)s, %(size)s to download) writes them, in the folder %(folder)s:"
    ),
    say("or name what they show by a made-up word alone:"),
    say("%(names)s: no caption in a %(suffix)s file; %(word)s (class_tokens) stands for it"),
    say("First %(deeds)s. Then %(command)s checks, caches and trains"),
    say("First %(deeds)s. Then %(command)s downloads the model, checks, caches and trains"),
    say("left out: %(reason)s"),
    say("%(names)s: left out, %(reason)s"),
    say("%(names)s: shorter than %(frames)s frames (at %(fps)s a second)"),
    say("%(names)s: pictures, of which this model learns nothing"),
    say("%(names)s: too short for a clip of this model, which learns their first frame"),
    say("%(names)s: an empty caption: nothing is learned by name"),
    say("%(names)s: empty captions: nothing is learned by name"),
    say("%(names)s: an empty caption: only %(word)s is learned there"),
    say("%(names)s: empty captions: only %(word)s is learned there"),
    say("%(folder)s: learned by its masks"),
    say(
        "%(captions)s: lists of tags (%(tags)s, ...), learned as they stand: %(model)s was trained on "
        "sentences"
    ),
    say("captions that are not UTF-8: %(names)s: read as %(encoding)s"),
    say("%(n)s cannot be read and has no caption, which ends a run: delete each, or move it away:"),
    say("%(n)s cannot be read and have no caption, which ends a run: delete each, or move it away:"),
    # how a run ended
    say("ended by an error after step %(step)s: %(reason)s"),
    say("ended while %(doing)s: %(reason)s"),
    say("ended while %(doing)s"),
    say("stopped after step %(step)s"),
    # the memory of a run
    say("most host memory of this process so far, measured"),
    say("a training step, predicted"),
    say("a training step, measured"),
    say("highest of the run with samples, measured"),
    say("device"),
    say("not known"),
    say("%(device)s: a prediction is made for CUDA devices (--plan)"),
)
# what stands in their places
PARTS = (
    say("%(some)s and %(more)s more"),
    say("%(one)s and %(two)s"),
    say("%(one)s, and %(two)s"),
    say("%(n)s pictures"),
    say("%(n)s clips"),
    say("%(n)s sounds"),
    say("1 picture"),
    say("1 clip"),
    say("1 sound"),
    say("%(n)s captions"),
    say("pictures"),
    say("clips"),
    say("a CPU (--memory 12: a card of 12 GiB)"),
    say("a card of %(n)s GiB"),
    say("its files are there"),
    say("%(n)s to download"),
    say("Slow on a CPU"),
    say("correct what is listed above"),
    say("give captions or a trigger word as above"),
    say("exit code %(code)s"),
    say("it was stopped"),
    say("downloading the model"),
    say("checking the files"),
    say("checking the captions"),
    say("caching latents"),
    say("caching captions"),
    say("training"),
)
# titles of the commands that can follow a run, and sentences below them
COMMANDS = (
    say("Generate with it"),
    say("Continue after a stop"),
    say("Train longer"),
    say("Train longer, as a new run from the trained file"),
    say("Extract a LoRA from it"),
    say("Convert the LoRA for %(program)s"),
    say("This run, as it was started"),
    say("The first sample again; change the prompt."),
    say("Commands here are typed in the folder %(folder)s."),
    say("Ctrl-C saves a state and ends the run; this continues from the newest state."),
    say("From the newest state to twice as many steps."),
    say("No state was saved: a new run of as many steps begins with the trained weights."),
    say("It saves a state, so that the next one can continue exactly."),
    say("The difference to the base at this rank; the command says how much of it the LoRA keeps."),
    say("Fill in %(names)s first: the run does not know this."),
    say("%(name)s is not saved yet."),
    say("%(name)s is not there any more: %(other)s takes its place."),
    say("%(name)s is not the best file by its scores: %(other)s takes its place."),
)
SENTENCE_END = re.compile(r"(?<=\.) (?=[A-Z])")
# errors that end a run; of several lines, the first
REASONS = (
    say("the device has too little memory for this run: %(reason)s."),
    say(
        "step %(step)s: the loss is %(loss)s, the gradient norm %(norm)s; nothing of this step was saved. "
        "The items of this process in that step: %(names)s."
    ),
    say("step %(step)s: the loss is %(loss)s, the gradient norm %(norm)s; nothing of this step was saved."),
    say(
        "%(path)s cannot be written: the disk is full. No partial file was kept. Free some space or choose "
        "another folder, and run again."
    ),
    say(
        "%(path)s cannot be written: %(reason)s. No partial file was kept. Choose another folder, and run "
        "again."
    ),
    say("%(path)s: there is no such file or folder. Did you mean %(near)s?"),
    say("%(path)s: there is no such file or folder."),
    say("%(path)s: no such cache file"),
    say("%(path)s: damaged, cannot be read as safetensors (%(error)s)"),
    say(
        "another process of this run was lost: it was killed, or ended by an error. The run cannot continue "
        "without it; what was saved is untouched."
    ),
)
PLACE = re.compile(r"%\((\w+)\)s")
# ends of lines for a terminal: the page has buttons instead
AT_END = ("written: ", "checks, caches and trains")


def is_for_terminal(line: str) -> bool:
    """Return whether a line only says which files were written, or which command is next."""
    return line.startswith(AT_END[0]) or (line.endswith(AT_END[1]) and not line.startswith("First "))


def translate_line(line: str) -> str:
    """Return a printed line as a text that pages translate; a line in an unknown form unchanged."""
    return _find(line, LINES) or line


def translate_reason(text: str) -> str:
    """Return the message of an error that ended a run as a text that pages translate, if it is known."""
    first, end, rest = text.partition("\n")
    known = _find(first, REASONS)
    return text if known is None else join("", (known, end + rest))


def translate_command(command: PageCommand) -> PageCommand:
    """Return a command of a history with its title and the known sentences below it as translatable texts."""
    sentences = [_find(one, COMMANDS) or one for one in SENTENCE_END.split(command.note)]
    title = _find(command.title, COMMANDS) or command.title
    return replace(command, title=title, note=join(" ", sentences))


def translate_memory(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the lines about the memory of a run, name and value, as texts that pages translate."""
    return [(translate_line(name), translate_line(value)) for name, value in rows]


def _find(text: str, forms: Sequence[Words]) -> Words | None:
    for form in forms:
        values = _read_values(form.key, text)
        if values is not None:
            translated = {name: _find(value, (*REASONS, *PARTS)) or value for name, value in values.items()}
            return Words(text, form.key, translated)
    return None


def _read_values(key: str, text: str) -> dict[str, str] | None:
    """Return the values in the placeholders of a form; None if the text has another form.

    A placeholder ends at the first occurrence of the words after it, so that no file name can make this slow.
    """
    begin, *rest = PLACE.split(key)
    if not text.startswith(begin):
        return None
    values = {}
    text = text[len(begin) :]
    for name, words in zip(rest[::2], rest[1::2], strict=True):
        is_last = name == rest[-2]
        place = len(text) - len(words) if is_last else text.find(words)
        if place < 1 or not text.startswith(words, place):
            return None
        values[name] = text[:place]
        text = text[place + len(words) :]
    return None if text else values
