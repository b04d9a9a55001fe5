"""Translate the lines that `new` prints, and common lines of checks and trainings.

Programs print English. A line that matches one of the patterns below is shown translated, with its names and
numbers; any other line is shown as it was printed.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from browser.jobs.check_lines import (
    CHECK_LINE_PARTS,
    CHECK_LINES,
    FAULT_LINE,
    FAULTS,
    FILE_KINDS,
    UNKNOWN_FILE,
    UNREAD_FILES,
    UNREAD_LINES,
)
from modules.console import pluralize
from modules.pages.language import TranslatableText, join, say
from training.reports.history import PageCommand

# if several patterns match a line, the first is used
LINES = (
    say("%(folder)s: %(media)s. %(model)s at %(size)s, %(frames)s frames, on %(card)s"),
    say("%(folder)s: %(media)s. %(model)s at %(size)s, on %(card)s"),
    say("%(names)s: tiny, below %(pixels)s pixels: the model would learn their blur"),
    say(
        "%(size)s: the size of a typical file, %(file)s. Every file keeps its own shape, at this area "
        "(resolution in dataset.toml)"
    ),
    say("%(model)s makes %(media)s; %(files)s. %(free)s are free on the disk of %(folder)s"),
    say("%(model)s makes %(media)s; %(files)s. %(fit)s. %(free)s are free on the disk of %(folder)s"),
    say("%(model)s makes %(media)s; %(files)s. %(fit)s"),
    say(
        "%(names)s: without a caption in a %(suffix)s file next to it, which `run` refuses. A model "
        "(%(model)s, %(size)s to download) writes them, in the folder %(folder)s:"
    ),
    say("or name what they show by a made-up word alone:"),
    say("%(names)s: no caption in a %(suffix)s file; %(word)s (class_tokens) stands for it"),
    say("First %(deeds)s. Then %(command)s downloads the model, checks, caches and trains"),
    say("First %(deeds)s. Then %(command)s checks, caches and trains"),
    say("%(names)s: transparent in part, which is learned; alpha_mask = true in dataset.toml leaves it out"),
    say(
        "%(names)s: transparent in part, which is learned as white; alpha_mask = true in dataset.toml "
        "leaves it out"
    ),
    say(
        "%(names)s: %(model)s is trained only on images. The first frame of each clip is written as an "
        "image with its caption into %(folder)s"
    ),
    say(
        "%(folder)s: %(kind)s learns from its pairs with %(controls)s. --train lora trains a LoRA "
        "without them"
    ),
    say("%(folder)s: %(kind)s learns from its pairs with %(controls)s"),
    say(
        "%(folder)s: %(count)s (is_reg), %(word)s for those without a caption, as %(reason)s. To train on "
        "them like on other images, rename the folder"
    ),
    say(
        "%(folder)s: %(count)s (is_reg), as %(reason)s. To train on them like on other images, rename the "
        "folder"
    ),
    say(
        "%(folder)s: left out, as %(reason)s. A dataset file with [[datasets.subsets]] and is_reg = true "
        "supports them (docs/image_datasets.md). To train on them like on other images, rename the folder"
    ),
    say(
        "%(folder)s: left out, as %(reason)s, and %(kind)s does not use such images. To train on them like "
        "on other images, rename the folder"
    ),
    say(
        "%(folder)s: left out: %(names)s: regularization images without a caption, in a folder "
        "whose name has no class. Call it 1_man, with the word for the class, or add captions"
    ),
    say(
        "%(folder)s: by its name, each file is trained %(times)s an epoch (num_repeats), and %(word)s "
        "is the caption of files without one (class_tokens)"
    ),
    say("%(folder)s: masks are left out. %(key)s in dataset.toml, with their images, takes them"),
    say("%(names)s: captions without a file. %(name)s seems to be that of %(file)s: call it %(right)s"),
    say(
        "%(names)s: captions without a file. A caption has the name of its file, such as %(example)s for "
        "cat.png"
    ),
    say(
        "%(names)s: more than %(n)s times as long as wide, a shape that few models were trained on: crop them"
    ),
    say("%(names)s: equal copies, which are trained more often than others. Delete all but one of %(n)s"),
    say("... and %(n)s more groups of equal copies"),
    say("%(files)s to learn from: few. They would mostly be memorized; 10 to 30 are usual"),
    say(
        "%(captions)s: lists of tags (%(tags)s, ...). %(reader)s such lists, so they are in another "
        "order each time (shuffle_caption), %(kept)s. The training encodes them in each step"
    ),
    say(
        "%(captions)s: lists of tags (%(tags)s, ...). %(reader)s such lists, so they are in another "
        "order each time (shuffle_caption). The training encodes them in each step"
    ),
    say(
        "%(tag)s: the model's own tags have spaces (%(words)s). To convert yours (the old captions are kept "
        "as .bak), run this in the folder %(folder)s:"
    ),
    say(
        "%(tag)s: such a model's own tags have spaces (%(words)s). To convert yours (the old captions are "
        "kept as .bak), run this in the folder %(folder)s:"
    ),
    say("then run `new` again, because the lists are separated by commas afterwards:"),
    say(
        "%(folder)s: left out. A folder of this name contains source images of edits, and %(model)s "
        "does not edit, --task %(task)s does. To train on it, rename it"
    ),
    say(
        "%(folder)s: left out. A folder of this name contains source images of edits, and %(model)s "
        "does not edit. To train on it, rename it"
    ),
    say("%(folder)s: left out. Runs write into a folder of this name: rename it"),
    say("%(folder)s: left out because it is too deep. Move its files up, or pass this folder to `new`"),
    say("%(folder)s: left out. No file there has the name of an image next to it"),
    say(
        "%(folder)s: left out, as %(kind)s does not use control images. %(n)s of %(total)s images have "
        "one there. --train %(option)s trains %(other)s on such pairs (docs/control.md)"
    ),
    say(
        "%(folder)s: left out, as %(kind)s does not use control images. %(n)s of %(total)s images have "
        "one there"
    ),
    say(
        "%(folder)s: %(n)s of %(total)s images have no reference in %(source)s, such as %(name)s: trained "
        "without one"
    ),
    say("%(names)s: learned as results. If others are made from them, move them into a folder named control"),
    say("%(names)s: not trained on, its reference cannot be read: %(reason)s"),
    say("%(names)s: without sound: only their pictures are used"),
    say(
        "%(names)s: captions of %(count)s. %(n)s are written into %(suffix)s files, which are used from "
        "now on"
    ),
    say("%(names)s: captions of %(count)s"),
    say("%(names)s: the %(suffix)s file differs from the list, and is used"),
    say("--task %(task)s is taken: %(about)s. Others: %(others)s"),
    say("--task %(typed)s: %(task)s is taken, %(about)s"),
    say(
        "--task %(task)s: the network has %(size)s, and a card of %(memory)s GiB holds a part of it. "
        "Smaller: %(others)s"
    ),
    say("The whole model is trained. Its weights: %(fit)s"),
    say("Each saved file has %(size)s; with the states output takes about %(total)s"),
    say("--%(option)s: taken from %(file)s. --model_file %(value)s uses another one"),
    say(
        "This processor computes bfloat16 many times slower than float32, so everything is in float32, which "
        "needs twice the memory. On a card, describe the folder again with --memory GIB --overwrite"
    ),
    say(
        "This machine's GPU has no bfloat16, so the training is in float16 (mixed_precision in run.toml). "
        'If its loss becomes NaN, the model leaves the range of float16: write "no" there, for float32'
    ),
    say("Files recognized:"),
    say("Nothing is wrong."),
    say("In the folder %(folder)s:"),
    say("The run can begin: %(command)s"),
    say("caches: %(valid)s files are valid, %(new)s items need encoding"),
    say("caches of %(name)s: %(valid)s are valid, %(new)s captions need encoding"),
    say("left out: %(reason)s"),
    say("%(names)s: left out, %(reason)s"),
    say("%(names)s: shorter than %(frames)s frames (at %(fps)s a second)"),
    say("%(names)s: images, which this model cannot train on"),
    say("%(names)s: too short for a clip of this model, which learns their first frame"),
    say("%(names)s: an empty caption: nothing is learned under a name"),
    say("%(names)s: empty captions: nothing is learned under a name"),
    say("%(names)s: an empty caption: only %(word)s is learned there"),
    say("%(names)s: empty captions: only %(word)s is learned there"),
    say("%(folder)s: learned by its masks"),
    say("%(captions)s: lists of tags (%(tags)s, ...), used unchanged: %(model)s was trained on sentences"),
    say("captions that are not UTF-8: %(names)s: read as %(encoding)s"),
    say("%(n)s cannot be read and has no caption, which ends a run: delete each, or move it away:"),
    say("%(n)s cannot be read and have no caption, which ends a run: delete each, or move it away:"),
    say("%(folder)s: made from %(source)s"),
    say("%(licence)s: %(terms)s (%(unverified)s). https://%(address)s"),
    say("%(licence)s: %(terms)s. https://%(address)s"),
    say("wrote %(file)s"),
    say("dataset.toml, [[datasets]] %(table)s: %(images)s, %(items)s"),
    # reasons why full training of a model is impossible
    say("the file of %(model)s has weights in 8 bits, in which steps would be lost"),
    say("%(model)s has no script that trains it whole"),
    say("%(model)s has two transformers, which are trained one at a time: see docs/wan22.md"),
    say("%(model)s takes %(size)s GiB of weights and about %(more)s more, but the card has %(memory)s GiB"),
    # errors that end `new`
    say(
        "%(kind)s: %(folder)s: %(model)s learns edits, and there is no image to edit from. "
        "Make a folder like this:"
    ),
    say(
        "%(kind)s: %(folder)s: %(model)s learns edits, and there is no image to edit from. "
        "%(names)s seem to be such images: move them into %(place)s. Make a folder like this:"
    ),
    say("%(path)s  the edit as a text, such as: the cat wears a hat"),
    say("%(path)s  what it is made from; of several cat_0.jpg, cat_1.jpg"),
    say("%(path)s  a result"),
    say("Other names for control: before, source, reference. It may also be next to the folder of results."),
    say("%(kind)s: %(folder)s has no clip and no image that can be read. Pass a folder that has one."),
    say("%(kind)s: %(folder)s has no sound, and %(model)s learns sound. Use clips that have some."),
    say(
        "%(kind)s: %(folder)s has no sound, and %(model)s learns sound. Use clips that have some, or "
        "take --task %(task)s, which is trained on pictures and movement only."
    ),
    say(
        "%(kind)s: --task %(task)s learns from clips of at least %(seconds)s seconds, and %(folder)s "
        "has none. Choose another --family or --task."
    ),
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
# texts that placeholders of the lines above may contain; they are translated too
PLACEHOLDER_TEXTS = (
    say("%(word)s is the class of %(subject)s: its images seem to be for regularization"),
    say("%(name)s is the name of a folder of regularization images"),
    say("%(n)s files"),
    say("1 file"),
    say("1 caption"),
    say("a LoRA"),
    say("a ControlNet-LLLite"),
    say("a ControlNet"),
    say("an embedding"),
    say("the whole model"),
    say("once"),
    say("%(n)s times"),
    say("%(n)s regularization images"),
    say("1 regularization image"),
    say("but for the first %(n)s (keep_tokens)"),
    say("but for those before %(mark)s (keep_tokens_separator)"),
    say("Models made from %(model)s on tags read"),
    say("%(model)s reads"),
    say("neither media nor captions"),
    say("this kind is not read; %(remedy)s"),
    say("convert them to PNG, or `pip install pillow-heif`"),
    say("convert them to PNG, or install a plugin of Pillow that reads them"),
    say("convert them to PNG"),
    say("develop them to PNG"),
    say("unpack them"),
    say("convert them to .mp4"),
    say("audio_directory in dataset.toml takes sounds of clips by their names and, for LTX-2, sounds alone"),
    say("as %(kind)s uses only images"),
    say("because they have no layers, such as %(name)s"),
    say("conditioning images of OneTrainer. Move them into a folder control"),
    say("it cannot be listed (%(reason)s)"),
    say(
        "captions are read from %(suffix)s files. Rename them, or in a folder of their own give its "
        "table in dataset.toml %(key)s"
    ),
    say("%(file)s is empty (0 bytes)"),
    say("%(file)s is not an image that can be read, or it is damaged"),
    say("%(file)s: its caption cannot be read. Save it as UTF-8"),
    say("a file of that name"),
    say("the file of that name"),
    say(
        "%(file)s, of files from %(smallest)s to %(largest)s, reduced to the area of %(area)s that "
        "the model's page has"
    ),
    say("%(file)s, reduced to the area of %(area)s that the model's page has"),
    say("%(file)s, of files from %(smallest)s to %(largest)s"),
    say("Its transformer: fits"),
    say("Its transformer: %(fit)s"),
    say("fits"),
    say("fits in 8 bits"),
    say("does not fit"),
    say("in 8 bits, %(left)s GiB in RAM"),
    say("edits"),
    say("layers"),
    say("sound"),
    say("%(size)s in float32"),
    say("%(size)s in bf16, which fits a card of %(memory)s GiB"),
    say("%(size)s in bf16, of which about %(left)s GiB stay in RAM"),
    say("%(n)s images"),
    say("1 image"),
    say("%(n)s items"),
    say("1 item"),
    say("%(some)s and %(more)s more"),
    say("%(one)s, and %(two)s"),
    say("%(one)s and %(two)s"),
    say("%(n)s images"),
    say("%(n)s clips"),
    say("%(n)s sounds"),
    say("1 image"),
    say("1 clip"),
    say("1 sound"),
    say("%(n)s captions"),
    say("images"),
    say("clips"),
    say("a CPU (--memory 12: a card of 12 GiB)"),
    say("a card of %(n)s GiB"),
    say("its files are there"),
    say("%(n)s to download"),
    say("Slow on a CPU"),
    say("them"),
    say("it"),
    say("this"),
    say("the base (%(file)s)"),
    say("the full model (%(file)s)"),
    say("the released network (%(file)s)"),
    say("the transformer called %(file)s"),
    say("the distilled model"),
    say("the distilled one"),
    say("the model that it was made from"),
    say("the sft or pretrain release of the same size"),
    say("%(one)s or %(other)s (with its file)"),
    say("%(one)s (for Chroma on %(other)s)"),
    say("the file of %(repository)s"),
    say("a LoRA that undoes the distillation, for schnell that of %(repository)s"),
    say("a LoRA that undoes the distillation"),
    say("fix the problems listed above"),
    say("add captions or a trigger word as above"),
    say("exit code %(code)s"),
    say("it was stopped"),
    say("downloading the model"),
    say("checking the files"),
    say("checking the captions"),
    say("caching latents"),
    say("caching captions"),
    say("training"),
)
# a warning about a distilled model is several sentences, each translated on its own
SENTENCES = (
    say("%(model)s was distilled to few steps, and plain training unlearns them"),
    say("%(model)s has guidance distilled into it, and plain training unlearns it"),
    say(
        "%(model)s was distilled to run without guidance, and perhaps in few steps, and plain training "
        "unlearns this"
    ),
    say("Train on %(base)s, whose LoRAs work on %(model)s too, or pass --training_adapter with %(adapter)s"),
    say("Train on %(base)s, whose LoRAs work on %(model)s too"),
    say("Train on %(base)s, or pass --training_adapter with %(adapter)s"),
    say("Train on %(base)s"),
    say("Pass --training_adapter with %(adapter)s, or use one of the targets that keep %(skill)s"),
    say("Train a LoRA with one of the targets that keep it: see docs/targets.md"),
    say(
        "Or take the comment signs from the lines of a target that keeps %(skill)s, in [training] of run.toml"
    ),
    say("Take the comment signs from the lines of a target that keeps %(skill)s, in [training] of run.toml"),
    say("--task %(task)s downloads an adapter and trains with it"),
)
VERSION = say("--task %(task)s (%(about)s)")
VERSION_END = re.compile(r"(?<=\)), (?=--task )")
COUNT = "%(n)s"
# placeholders that stand for kinds of files
FILE_KIND_PLACEHOLDERS = (
    "file_kind",
    "wanted",
    "what",
    "other",
    "of_file",
    "families",
)
CATALOGUE_PLACEHOLDERS = ("about", "terms", "unverified")  # placeholders for texts from the catalogue
# titles of the commands suggested after a run, and the sentences below them
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
    say("%(name)s is not the best file: %(other)s takes its place."),
)
SENTENCE_END = re.compile(r"(?<=\.) (?=[A-Z])")
NEXT_SENTENCE = re.compile(r"\. (?=[A-Z]|--task )")  # between two of SENTENCES
# errors that end a run; of a message with several lines, the first line
RUN_ERRORS = (
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
PLACEHOLDER = re.compile(r"%\((\w+)\)s")
# beginning and end of lines that are only useful in a terminal: the page has buttons instead
WRITTEN_FILES = "written: "
NEXT_COMMAND = "checks, caches and trains"


def is_for_terminal(line: str) -> bool:
    """Return whether a printed line only lists written files or the next command to type."""
    if line.startswith(WRITTEN_FILES):
        return True
    return line.endswith(NEXT_COMMAND) and not line.startswith("First ")  # "First ..." names missing inputs


def translate_line(line: str) -> str:
    """Return a printed line as translatable text; an unknown line unchanged."""
    known = _translate_by_pattern(line, (*UNREAD_LINES, *LINES, *CHECK_LINES)) or _find_fault(line)
    if known is not None:
        return known
    sentences = [_translate_by_pattern(text, SENTENCES) for text in NEXT_SENTENCE.split(line)]
    known = sentences.pop()
    while known is not None and sentences:
        sentence = sentences.pop()
        known = None if sentence is None else say("%(sentence)s. %(rest)s", sentence=sentence, rest=known)
    return known or line


@functools.lru_cache(maxsize=4096)
def translate_log_line(line: str) -> str:
    """Return a line of a command's log as translatable text; an unknown line unchanged."""
    text = line.strip()
    indent = line[: len(line) - len(line.lstrip())]
    known = translate_line(text)
    if known is text:
        known = _translate_by_pattern(text, (*RUN_ERRORS, *COMMANDS)) or text
    return join("", (indent, known)) if indent else known


def translate_file_kind(kind: str | None) -> str:
    """Return the kind of a model file, from `checkpoints.kinds.describe_file_kind`, as translatable text."""
    return UNKNOWN_FILE if kind is None else _translate_by_pattern(kind, FILE_KINDS) or kind


def translate_reason(text: str) -> str:
    """Return the error message that ended a run, as translatable text if the message is known."""
    first, end, rest = text.partition("\n")
    known = _translate_by_pattern(first, RUN_ERRORS)
    return text if known is None else join("", (known, end + rest))


def translate_command(command: PageCommand) -> PageCommand:
    """Return a history's suggested command with its title and note, as far as known, as translatable text."""
    sentences = []
    for sentence in SENTENCE_END.split(command.note):
        sentences.append(_translate_by_pattern(sentence, COMMANDS) or sentence)
    title = _translate_by_pattern(command.title, COMMANDS) or command.title
    return replace(command, title=title, note=join(" ", sentences))


def translate_memory(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the lines about the memory of a run, name and value, as translatable text."""
    return [(translate_line(name), translate_line(value)) for name, value in rows]


def _translate_by_pattern(text: str, patterns: Sequence[TranslatableText]) -> TranslatableText | None:
    """Return printed text as translatable text by the first pattern that it matches; None without one."""
    for pattern in patterns:
        values = _match_placeholders(pattern.key, text)
        if values is not None:
            translated_values = {name: _translate_placeholder(name, value) for name, value in values.items()}
            return TranslatableText(text, pattern.key, translated_values)
    return None


def _find_fault(line: str) -> TranslatableText | None:
    """Return a line such as `2 have no caption:` as translatable text; None for any other line."""
    # The patterns in FAULTS are plural, such as `%(n)s have no caption`.
    text = line.removesuffix(":")
    number, _, _ = text.partition(" ")
    if not line.endswith(":") or not number.isdigit():
        return None
    for pattern in FAULTS:
        key = pattern.key
        if number == "1":  # make the pattern singular, as the program has printed it: `1 has no caption`
            key = pluralize(1, key.replace(COUNT, "", 1).strip()).replace("1", COUNT, 1)
        values = _match_placeholders(key, text)
        if values is not None:
            fault = TranslatableText(text, pattern.key, values)
            return TranslatableText(line, FAULT_LINE.key, {"fault": fault})
    return None


def _translate_placeholder(name: str, value: str) -> str:
    """Return the value of a message's placeholder, as translatable text if it matches a known pattern."""
    if name in CATALOGUE_PLACEHOLDERS:
        return TranslatableText(value, value, {})
    if name == "kinds":  # suffixes of files that are not read
        kinds = [_translate_by_pattern(kind, (UNREAD_FILES,)) or kind for kind in value.split("; ")]
        return join("; ", kinds)
    if name == "others":  # versions of a model, each with its words from the catalogue
        versions = VERSION_END.split(value)
        return join(", ", [_translate_by_pattern(text, (VERSION,)) or text for text in versions])
    patterns: tuple[TranslatableText, ...] = (*RUN_ERRORS, *CHECK_LINE_PARTS, *PLACEHOLDER_TEXTS)
    if name in FILE_KIND_PLACEHOLDERS:
        patterns = (*FILE_KINDS, *patterns)
    return _translate_by_pattern(value, patterns) or value


def _match_placeholders(key: str, text: str) -> dict[str, str] | None:
    """Match a printed text with a translatable pattern, and return the values of the pattern's placeholders.

    Returns None if the text does not match. A placeholder ends at the first occurrence of the
    text after it, so that no file name can make this slow.
    """
    # `fixed text, name, fixed text, name, ..., fixed text`
    beginning, *names_and_texts = PLACEHOLDER.split(key)
    if not text.startswith(beginning):
        return None
    values = {}
    remaining = text[len(beginning) :]
    for name, following_text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True):
        is_last = name == names_and_texts[-2]
        # the last fixed text has to end the text, so it is not searched
        end = len(remaining) - len(following_text) if is_last else remaining.find(following_text)
        # a placeholder stands for at least one character
        if end < 1 or not remaining.startswith(following_text, end):
            return None
        values[name] = remaining[:end]
        remaining = remaining[end + len(following_text) :]
    return None if remaining else values
