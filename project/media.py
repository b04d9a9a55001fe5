"""Look at a folder: list clips, pictures, sounds and references, and lines about files left out or odd."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from dataset.sources.captions import caption_path, describe_encoding, read_caption_file
from dataset.sources.folders import ControlFolder
from dataset.sources.left_out import FOLDERS_OF_RUNS, NO_MEDIA, remedy_of
from dataset.subsets import FolderName, read_folder_name
from modules.console import count_of
from modules.errors import DatasetError, MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.opening import SOUND_SUFFIXES, open_image
from modules.media.reading import VIDEO_SUFFIXES, first_frame, image_size, image_suffixes
from modules.media.samples import track_facts
from modules.media.streams import source_info
from modules.text_files import real_path
from project.choosing import ModelFacts
from project.listed_captions import ListedCaptions, read_lists
from project.options import RUN_FILE

CAPTIONS = ".txt"
OTHER_CAPTIONS = (".TXT", ".caption")  # the second of image trainers
WRITTEN = ("dataset.toml", "prompts.txt", RUN_FILE)
CHECK_PAGE = "check.html"
FIRST_FRAMES = "first_frames"  # folder of pictures that `new` takes from clips
OWN_FOLDERS = {*FOLDERS_OF_RUNS, FIRST_FRAMES}
MASKS = {"mask", "masks"}
REGULARISATION = re.compile(r"regs?|regulari[sz]ation([-_ ]?images?)?|class([-_ ]images?)?", re.IGNORECASE)
# folders of what pictures are made from, also as control_images
REFERENCES = re.compile(
    r"(controls?|before|sources?|references?|refs?|inputs?|originals?|conditions?|conditioning)"
    r"([-_ ]?(images?|pictures?))?",
    re.IGNORECASE,
)
SHOWN = 3  # names in a line
FEW_PIXELS = 256  # of the shorter side: less is enlarged, and its blur is learned
LONG = 4  # sides of one picture
MOST_FOLDERS = 1000  # that are looked into for media that are left out
MOST_REPEATS = 1000  # in the name of a folder; larger numbers are years and the like
SOUND_HELP = (
    "audio_directory in dataset.toml takes sounds of clips by their names and, for LTX-2, sounds alone"
)


@dataclass(frozen=True)
class Media:
    """A clip, a picture or a sound."""

    path: Path
    kind: Literal["video", "image", "audio"]  # of its table in dataset.toml
    size: tuple[int, int]  # width, height; of a sound 0, 0
    seconds: Fraction | None  # None: a picture, or a file that does not say
    caption: str | None  # on one line; None: there is none

    @property
    def is_clip(self) -> bool:
        return self.kind == "video"


@dataclass
class Found:
    """Content of a folder; `lines` say what is left out, and why."""

    media: list[Media] = field(default_factory=list)
    names: dict[Path, FolderName] = field(default_factory=dict)  # what names of folders say to trainers
    listed: ListedCaptions = field(default_factory=ListedCaptions)
    # files that `new` writes: captions from lists, and the first frames of clips
    new_captions: dict[Path, str] = field(default_factory=dict)
    other_captions: list[Path] = field(default_factory=list)  # files whose caption file is not as the list
    bad_captions: set[Path] = field(default_factory=set)  # files whose caption cannot be read
    unreadable: list[Path] = field(default_factory=list)  # clips and pictures
    first_frames: dict[Path, Path] = field(default_factory=dict)  # picture -> clip
    # folder of pictures -> folder of their references
    references: dict[Path, Path] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    captions: str = CAPTIONS  # suffix of their files


def look_at(
    folder: Path, facts: ModelFacts, name: str, edits: str = "", hearing: str = "", silent: str = ""
) -> Found:
    """Return the media of a folder and of its sub-folders, with references if the model edits.

    name: of the model, for messages. edits: name of a model of its family that edits, if this one does not.
    hearing: models that learn sounds alone. silent: task of the family that learns clips without their sound.
    Raises DatasetError if there are no media, no references for a model that needs them, or no sound for a
    model that learns it.
    """
    found = Found()
    places, sources, regularising = _sort_folders(folder, found)
    found.captions = _find_captions(places)
    found.lines += list(_tell_names(places, found.names))
    suffixes = _media_suffixes() | SOUND_SUFFIXES
    media = {place: _files_in(place, suffixes) for place in places}
    found.listed = read_lists(media, {*WRITTEN, CHECK_PAGE})
    before, sounds = len(found.lines), list[Path]()
    for place in places:
        sounds += _list_media(place, found, facts)
        nested = [one for one in _folders(place) if place != folder and one not in {*places, *regularising}]
        deep = [one for one in nested if not REFERENCES.fullmatch(one.name)]
        found.lines += [f"{one}: {text}" for one, text in _find_deep(deep)]
    _add_sounds(found, sounds, facts)
    found.lines[before:before] = _tell_lists(found)
    if not facts.learns_clips:
        _take_first_frames(folder, found, name)
    if facts.references:
        _find_references(folder, places, sources, found)
    else:
        nested = [one for place in places[1:] for one in _sources_in(place)]
        found.lines += [
            f"{place}: left out. A folder of this name holds what pictures are made from, and {name} does "
            f"not edit{edits}. If it is to be learned, rename it"
            for place in (*sources, *nested)
            if _media_in(place)
        ]
    alone = f" {hearing} learns sounds alone." if sounds and hearing else ""
    instead = f", or take --task {silent}, which learns pictures and movement alone" if silent else ""
    _require_media(folder, found, facts, name=name, alone=alone, instead=instead, has_sounds=bool(sounds))
    if facts.references and (numbered := _find_numbered(found.media)):
        text = "learned as results. If they are what others are made from, move them into a folder control"
        found.lines.append(f"{name_some(numbered)}: {text}")
    found.lines += _tell_odd(found, facts)
    return found


def _sort_folders(folder: Path, found: Found) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the folders with media to learn, with what they are made from, and for regularisation."""
    places, sources = [folder], list[Path]()
    for place in _folders(folder):
        kind = place.name.lower()
        if place.is_symlink() and real_path(place) in (real_path(folder), *real_path(folder).parents):
            continue  # it leads back here
        if REFERENCES.fullmatch(kind):
            sources.append(place)
        elif kind in MASKS:
            found.lines.append(f"{place}: masks are left out. mask_directory in dataset.toml takes them")
        elif kind not in OWN_FOLDERS:
            places += [place, *(one for one in _folders(place) if _name_of(one) is not None)]
        elif kind != FIRST_FRAMES and any(caption_path(path, CAPTIONS).exists() for path in _media_in(place)):
            found.lines.append(f"{place}: left out. Runs write into a folder of this name: rename it")
    found.names = {place: name for place in places if (name := _name_of(place)) is not None}
    learned, regularising = list[Path](), list[Path]()
    for place in places:
        why = _why_regularisation(place, folder, found.names)
        (learned if why is None else regularising).append(place)
        if why is not None and _media_in(place):
            found.lines.append(
                f"{place}: left out, as {why}. A dataset file with [[datasets.subsets]] and is_reg = true "
                "takes them (docs/image_datasets.md). If they are to be learned as others, rename the folder"
            )
    return learned, sources, regularising


def _name_of(folder: Path) -> FolderName | None:
    """Return what the name of a folder says to image trainers, as in `10_ohwx man`."""
    name = read_folder_name(real_path(folder).name)
    return name if name is not None and name.repeats < MOST_REPEATS and name.words.strip() else None


def _why_regularisation(place: Path, folder: Path, names: Mapping[Path, FolderName]) -> str | None:
    """Return why a folder seems to hold regularisation pictures; None if it does not."""
    if place == folder:
        return None
    for one in (place, place.parent):
        if one != folder and REGULARISATION.fullmatch(one.name):
            return f"{one.name} is the name of a folder of regularisation pictures"
    name = names.get(place)
    if name is None:
        return None
    words = name.words.strip().lower()
    subject = next((one for one in names.values() if one.words.strip().lower().endswith(f" {words}")), None)
    if subject is None:
        return None
    return f"`{name.words}` is the class of `{subject.words}`: its pictures seem to be for regularisation"


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    return []


def _sources_in(folder: Path) -> list[Path]:
    return [one for one in _folders(folder) if REFERENCES.fullmatch(one.name)]


def _media_suffixes() -> frozenset[str]:
    return VIDEO_SUFFIXES | image_suffixes() | ANIMATION_SUFFIXES


def _media_in(folder: Path) -> list[Path]:
    return _files_in(folder, _media_suffixes())


def _files_in(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    return []


def _find_captions(places: Sequence[Path]) -> str:
    """Return the suffix of most caption files."""
    count, known = Counter[str](), (CAPTIONS, *OTHER_CAPTIONS)
    for place in places:
        with contextlib.suppress(OSError):
            names = {path.name for path in place.iterdir()}
            count.update(end for path in _media_in(place) for end in known if path.stem + end in names)
    return max(known, key=count.__getitem__)  # the first of equal ones


def _tell_names(places: Sequence[Path], names: Mapping[Path, FolderName]) -> Iterator[str]:
    """Yield lines about folders whose names mean something to image trainers."""
    for place in places:
        if place in names:
            name = names[place]
            times = "once" if name.repeats == 1 else f"{name.repeats} times"
            yield (
                f"{place}: by its name, each file is trained {times} an epoch (num_repeats), and "
                f"`{name.words}` is the caption of files without one (class_tokens)"
            )


def _tell_lists(found: Found) -> list[str]:
    """Return lines about lists of captions. To be called once the media have theirs."""
    lists = found.listed.lists
    alone = [path for path, count in lists.items() if path.suffix.lower() == ".json" and count == 1]
    lines = [
        f"{path.name}: captions of {count_of(count, 'file')}"
        for path, count in lists.items()
        if path not in alone
    ]
    lines += (
        [f"{name_some(alone)}: captions of {'the' if alone[1:] else 'a'} file of that name"] if alone else []
    )
    if lists and found.new_captions:
        lines[-1] += (
            f". {len(found.new_captions)} are written into {found.captions} files, which count from now on"
        )
    if found.other_captions:
        names = name_some(found.other_captions)
        lines.append(f"{names}: the {found.captions} file says something else than the list, and counts")
    return [*lines, *found.listed.lines]


def _find_deep(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield folders inside sub-folders that hold media, each with advice."""
    waiting, looked = list(folders), 0
    while waiting and looked < MOST_FOLDERS:
        place, looked = waiting.pop(0), looked + 1
        if place.is_symlink() or place.name.lower() in OWN_FOLDERS | MASKS:
            continue
        if _media_in(place):
            yield place, "left out because it is too deep. Move its files up, or give this folder to `new`"
        waiting += _folders(place)


def _list_media(place: Path, found: Found, facts: ModelFacts) -> list[Path]:
    """Add the clips and pictures of a folder, and lines about its other files. Returns its sounds."""
    suffixes, others = _media_suffixes(), dict[str, list[Path]]()
    try:
        paths = sorted(place.iterdir())
    except OSError as error:
        found.lines.append(f"{place}: left out, it cannot be listed ({error.strerror})")
        return []
    remarks: list[str] = []
    for path in paths:
        end = path.suffix.lower()
        is_ours = path.name in (*WRITTEN, CHECK_PAGE) or path.name.lower() in NO_MEDIA
        if is_ours or path.name[0] == "." or path.is_dir():
            continue
        if end not in suffixes:
            others.setdefault(end, []).append(path)
            continue
        try:
            found.media.append(_measure(path, found, facts, remarks))
        except MediaError as error:
            found.lines.append(f"left out: {error}")
            found.unreadable += [path] if path.is_file() else []  # no run looks at a link without a file
    if remarks:
        more = f" and {len(remarks) - 1} more" if len(remarks) > 1 else ""
        found.lines.append(f"captions that are not UTF-8: {remarks[0]}{more}")
    sounds = {path for end in others if end in SOUND_SUFFIXES for path in others[end]}
    media = [path for path in paths if path.suffix.lower() in suffixes or path in sounds]
    owned, stems = {caption_path(path, found.captions) for path in media}, {path.stem for path in media}
    for end, of_kind in others.items():
        if end == found.captions.lower():
            alone = [path for path in of_kind if path not in owned]
            doubled = alone and all(Path(path.stem).suffix.lower() in suffixes for path in alone)
            how = f", not cat.mp4{found.captions}: rename them" if doubled else ""
            told = f"{name_some(alone)}: captions of no file. That of cat.mp4 is cat{found.captions}{how}"
            found.lines += [told] if alone else []
            continue
        unread = [path for path in of_kind if path not in found.listed.looked and path not in sounds]
        if unread:
            found.lines.append(
                f"{name_some(unread)}: left out, {_why_left_out(unread, stems, found.captions)}"
            )
    return sorted(sounds)


def _why_left_out(paths: Sequence[Path], stems: set[str], captions: str) -> str:
    """Return why files of one kind, which are no media, are left out."""
    if paths[0].suffix in (CAPTIONS, *OTHER_CAPTIONS) and stems & {path.stem for path in paths}:
        return (
            f"captions are read from {captions} files. Rename them, or in a folder of their own "
            f'give its table in dataset.toml caption_extension = "{paths[0].suffix}"'
        )
    remedy = remedy_of(paths[0].suffix.lower())
    return "neither media nor captions" if remedy is None else f"this kind is not read; {remedy}"


def _add_sounds(found: Found, sounds: Sequence[Path], facts: ModelFacts) -> None:
    """Take sounds if there is nothing else and the model learns sounds alone; else add a line about them."""
    if not sounds:
        return
    if found.media or not facts.learns_sounds:
        found.lines.append(f"{name_some(sounds)}: left out, this kind is not read; {SOUND_HELP}")
        return
    remarks: list[str] = []
    for path in sounds:
        try:
            track = track_facts(path)
            if track is None:
                raise MediaError(f"{path} has no sound")
            caption = _find_caption(path, found, remarks)
            found.media.append(Media(path, "audio", (0, 0), None, caption))
        except MediaError as error:
            found.lines.append(f"left out: {error}")
            found.unreadable += [path] if path.is_file() else []  # no run looks at a link without a file


def _measure(path: Path, found: Found, facts: ModelFacts, remarks: list[str]) -> Media:
    """Return a clip or picture with its caption. Raises MediaError if it cannot be read."""
    caption = _find_caption(path, found, remarks)
    is_moving = path.suffix.lower() in VIDEO_SUFFIXES or (facts.learns_clips and is_animation(path))
    if not is_moving:
        return Media(path, "image", image_size(path), None, caption)
    info = source_info(path)
    seconds = None if info.frames is None else info.frames / info.rate
    return Media(path, "video", (info.width, info.height), seconds, caption)


def _find_caption(path: Path, found: Found, remarks: list[str]) -> str | None:
    """Return the caption of a file on one line: of its caption file, else of a list; None if there is none.

    remarks: takes a line about a file that is not UTF-8.
    """
    place = caption_path(path, found.captions)
    try:
        file = read_caption_file(place)
    except DatasetError:  # which the check of what was written reports
        found.bad_captions.add(path)
        return None
    if file is not None and file.encoding is not None:
        remarks.append(describe_encoding(place, file.text, file.encoding))
    text = None if file is None else file.text
    if text is None and path in found.listed.by_path:
        text = found.listed.by_path[path]
        found.new_captions[place] = text
    elif text is not None and found.listed.by_path.get(path, text) != text:
        found.other_captions.append(path)
    return None if text is None else " ".join(text.split())


def _take_first_frames(folder: Path, found: Found, name: str) -> None:
    """Put the first frame of each clip in its place, as a picture that `new` writes."""
    taken: list[Media] = []
    for one in found.media:
        if not one.is_clip:
            continue
        inside = one.path.parent.relative_to(folder)
        target = folder / FIRST_FRAMES / inside / f"{one.path.stem}.png"
        while target in found.first_frames:
            target = target.with_stem(f"{target.stem}_{one.path.suffix[1:]}")
        try:
            height, width, _ = first_frame(one.path).shape
        except MediaError as error:
            found.lines.append(f"left out: {error}")
            continue
        if one.path in found.bad_captions:
            found.lines.append(f"left out: {one.path}: its caption cannot be read. Save it as UTF-8")
            continue
        found.first_frames[target] = one.path
        if one.caption is not None:
            found.new_captions.pop(caption_path(one.path, found.captions), None)
            found.new_captions[caption_path(target, found.captions)] = one.caption
        taken.append(Media(target, "image", (width, height), None, one.caption))
        if one.path.parent in found.names:
            found.names[target.parent] = found.names[one.path.parent]
    found.media = [one for one in found.media if not one.is_clip] + taken
    if taken:
        names = name_some([*found.first_frames.values()])
        found.lines.append(
            f"{names}: {name} learns pictures alone. The first frame of each clip is written as a picture "
            f"with its caption into {folder / FIRST_FRAMES}"
        )


def _find_references(folder: Path, places: Sequence[Path], sources: Sequence[Path], found: Found) -> None:
    """Find the folder of references for each folder of pictures: in it, beside it, or beside all of them."""
    whole = folder.absolute()
    beside = [] if sources else [one for one in _sources_in(whole.parent) if one != whole]
    for place in places:
        pictures = [one.path.stem for one in found.media if one.path.parent == place and one.kind == "image"]
        nested = [] if place == folder else _sources_in(place)
        for source in (*nested, *sources, *beside) if pictures else ():
            without = _without_reference(source, pictures)
            if len(without) < len(pictures):
                found.references[place] = source
                found.lines += list(_tell_unread(place, source, found.media))
                if without:
                    text = f"{len(without)} of {len(pictures)} pictures have no reference in {source}"
                    found.lines.append(f"{place}: {text}, such as {without[0]}: learned without one")
                break
    unused = [one for one in sources if one not in found.references.values() and _media_in(one)]
    found.lines += [f"{one}: left out. No file there has the name of a picture beside it" for one in unused]


def _without_reference(source: Path, stems: Sequence[str]) -> list[str]:
    having = set[str]()
    with contextlib.suppress(DatasetError):  # it cannot be listed
        folder = ControlFolder(source, {*stems})
        for stem in stems:
            with contextlib.suppress(DatasetError):
                having |= {stem} if folder.for_image(stem, None) else set()
    return [stem for stem in stems if stem not in having]


def find_equal(media: Iterable[Media]) -> list[list[Path]]:
    """Return groups of files with equal bytes."""
    of_size: dict[int, list[Path]] = {}
    for one in media:
        with contextlib.suppress(OSError):
            of_size.setdefault(one.path.stat().st_size, []).append(one.path)
    equal: dict[str, list[Path]] = {}
    for paths in of_size.values():
        for path in paths if len(paths) > 1 else ():
            with contextlib.suppress(OSError), path.open("rb") as file:
                equal.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), []).append(path)
    return [paths for paths in equal.values() if len(paths) > 1]


def reference_of(media: Media, source: Path) -> tuple[Path, ...]:
    try:
        return ControlFolder(source, {media.path.stem}).for_image(media.path.stem, None)
    except DatasetError:
        return ()


def why_unread(path: Path) -> str:
    """Return why a reference cannot be read; "" if it can."""
    try:
        image_size(path)
    except MediaError as error:
        return str(error)
    return ""


def _tell_unread(place: Path, source: Path, media: Sequence[Media]) -> Iterator[str]:
    for one in media:
        if one.path.parent == place and one.kind == "image":
            for why in filter(None, map(why_unread, reference_of(one, source))):
                yield f"{one.path.name}: not trained on, its reference cannot be read: {why}"


def _find_numbered(media: Sequence[Media]) -> list[Path]:
    """Return pictures without captions that are named like references of another: cat_0, cat_input."""
    stems = {one.path.stem for one in media if one.kind == "image"}
    bare = [one.path for one in media if one.caption is None]
    parts = [(path, *path.stem.rpartition("_")) for path in bare]
    return [
        path
        for path, owner, _, end in parts
        if owner in stems and (end.isdecimal() or REFERENCES.fullmatch(end))
    ]


def _layout(folder: Path, name: str, media: Sequence[Media]) -> str:
    """Return the message that shows how pictures and their references are to be laid out."""
    numbered = _find_numbered(media)
    seem = f" {name_some(numbered)} seem to be such pictures: move them into {folder / 'control'}."
    told = seem if numbered else ""
    return (
        f"{folder}: {name} learns edits, and there is no picture to edit from.{told} Make this of it:\n"
        f"  {folder / 'cat.jpg'}          a result\n"
        f"  {folder / 'cat.txt'}          the edit as a text, such as: the cat wears a hat\n"
        f"  {folder / 'control' / 'cat.jpg'}  what it is made from; of several cat_0.jpg, cat_1.jpg\n"
        "Other names for control: before, source, reference. It may also stand beside the folder of results."
    )


def _tell_odd(found: Found, facts: ModelFacts) -> list[str]:
    """Return lines about media that are trained on, but perhaps not as they should be."""
    pictures = [one for one in found.media if one.kind == "image" and one.path not in found.first_frames]
    tiny = [one.path for one in found.media if one.kind != "audio" and min(one.size) < FEW_PIXELS]
    told: Mapping[str, Iterable[Path]] = {
        f"tiny, below {FEW_PIXELS} pixels: their blur is learned": tiny,
        f"more than {LONG} times as long as wide, as few models know pictures: crop them": (
            one.path for one in found.media if max(one.size) > LONG * min(one.size)
        ),
        "transparent in part, which is learned as white; alpha_mask = true in dataset.toml leaves it out": (
            one.path for one in pictures if _is_transparent(one.path)
        ),
        "without sound: learned silent": (
            one.path for one in found.media if facts.hears and one.is_clip and _is_silent(one.path)
        ),
    }
    lines = [f"{name_some(names)}: {what}" for what, each in told.items() if (names := list(each))]
    equal = find_equal(found.media)
    lines += [
        f"{' = '.join(_name_among(paths))}: equal copies, learned more often than others. "
        f"Delete all but one of {len(paths)}"
        for paths in equal[:SHOWN]
    ]
    return [*lines, f"... and {len(equal) - SHOWN} more groups of equal copies"] if equal[SHOWN:] else lines


def _name_among(paths: Sequence[Path]) -> list[str]:
    """Return the names of some files, with their folder if it differs."""
    same = len({path.parent for path in paths}) == 1
    return [path.name if same else f"{path.parent.name}/{path.name}" for path in paths[:SHOWN]]


def _is_transparent(path: Path) -> bool:
    with contextlib.suppress(MediaError), open_image(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A").getextrema()
            return isinstance(alpha[0], (int, float)) and alpha[0] < 255
    return False


def _require_media(
    folder: Path, found: Found, facts: ModelFacts, *, name: str, alone: str, instead: str, has_sounds: bool
) -> None:
    """Raise DatasetError if a folder lacks what a model learns.

    name: of the model. alone, instead: what else could be done with such a folder. has_sounds: sounds lie
    next to the clips, which `audio_directory` in dataset.toml joins with them.
    """
    why = "".join(f"\n  {line}" for line in found.lines)
    if not found.media:
        raise DatasetError(
            f"{folder} has no clip and no picture that can be read. Give one that has.{alone}{why}"
        )
    if facts.needs_reference and not found.references:
        raise DatasetError(_layout(folder, name, found.media) + why)
    if facts.hears and not has_sounds and not any(map(_has_sound, found.media)):
        raise DatasetError(
            f"{folder} has no sound, and {name} learns sound. Give clips that have some{instead}.{why}"
        )


def _has_sound(medium: Media) -> bool:
    return medium.kind == "audio" or (medium.is_clip and not _is_silent(medium.path))


def _is_silent(path: Path) -> bool:
    try:
        return is_animation(path) or track_facts(path) is None
    except MediaError:
        return True


def name_some(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
