"""Look at a folder: list clips, pictures and their references, and lines about files left out or odd."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from dataset.sources.captions import caption_path, read_caption
from dataset.sources.folders import ControlFolder
from dataset.sources.left_out import remedy_of
from modules.errors import DatasetError, MediaError
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.opening import SOUND_SUFFIXES, open_image
from modules.media.reading import VIDEO_SUFFIXES, image_size, image_suffixes
from modules.media.samples import track_facts
from modules.media.streams import source_info
from modules.text_files import real_path
from project.choosing import ModelFacts
from project.options import RUN_FILE

CAPTIONS = ".txt"
OTHER_CAPTIONS = (".TXT", ".caption")  # the second of image trainers
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
WRITTEN = ("dataset.toml", "prompts.txt", RUN_FILE)
CHECK_PAGE = "check.html"
OWN_FOLDERS = {"cache", "output"}
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
LISTS = {
    **dict.fromkeys(
        (".jsonl", ".csv", ".parquet"),
        "if it lists captions, image_jsonl_file or image_table_file in dataset.toml takes it",
    ),
    ".json": "write captions into .txt files",
    **dict.fromkeys(
        SOUND_SUFFIXES,
        "audio_directory in dataset.toml takes sounds of clips by their names and, for LTX-2, sounds alone",
    ),
}


@dataclass(frozen=True)
class Media:
    """A clip or a picture."""

    path: Path
    is_clip: bool
    size: tuple[int, int]  # width, height
    seconds: Fraction | None  # None: a picture, or a clip whose file does not say
    caption: str | None  # on one line; None: there is none


@dataclass
class Found:
    """Content of a folder; `lines` say what is left out, and why."""

    media: list[Media] = field(default_factory=list)
    # folder of pictures -> folder of their references
    references: dict[Path, Path] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    captions: str = CAPTIONS  # suffix of their files


def look_at(folder: Path, facts: ModelFacts, name: str, edits: str = "") -> Found:
    """Return the media of a folder and of its sub-folders, with references if the model edits.

    name: of the model, for messages. edits: name of a model of its family that edits, if this one does not.
    Raises DatasetError if there are no media, or no references for a model that needs them.
    """
    found = Found()
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
            places.append(place)
        elif any(caption_path(path, CAPTIONS).exists() for path in _media_in(place)):
            found.lines.append(f"{place}: left out. Runs write into a folder of this name: rename it")
    found.captions = _find_captions(places)
    found.lines += list(_tell_names(places))
    for place in places:
        _list_media(place, found)
        nested = [one for one in _folders(place) if place != folder and not REFERENCES.fullmatch(one.name)]
        found.lines += [f"{deep}: {text}" for deep, text in _find_deep(nested)]
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
    why = "".join(f"\n  {line}" for line in found.lines)
    if not found.media:
        raise DatasetError(f"{folder} has no clip and no picture that can be read. Give one that has.{why}")
    if facts.needs_reference and not found.references:
        raise DatasetError(_layout(folder, name, found.media) + why)
    if facts.references and (numbered := _find_numbered(found.media)):
        text = "learned as results. If they are what others are made from, move them into a folder control"
        found.lines.append(f"{name_some(numbered)}: {text}")
    found.lines += _tell_odd(found, facts)
    return found


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    return []


def _sources_in(folder: Path) -> list[Path]:
    return [one for one in _folders(folder) if REFERENCES.fullmatch(one.name)]


def _media_suffixes() -> frozenset[str]:
    return VIDEO_SUFFIXES | image_suffixes() | ANIMATION_SUFFIXES


def _media_in(folder: Path) -> list[Path]:
    suffixes = _media_suffixes()
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


def _tell_names(places: Sequence[Path]) -> Iterator[str]:
    """Yield lines about folders whose names mean something to other trainers."""
    for place in places:
        if (repeats := re.match(r"(\d{1,3})_", place.name)) is not None:
            key = f"num_repeats = {repeats[1]}"
            yield f"{place}: its number is not used. {key} in its table of dataset.toml repeats it"
        if REGULARISATION.fullmatch(place.name):
            text = "learned like the others. If it holds pictures to regularise with, move it away"
            yield f"{place}: {text}"


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


def _list_media(place: Path, found: Found) -> None:
    suffixes, others = _media_suffixes(), dict[str, list[Path]]()
    try:
        paths = sorted(place.iterdir())
    except OSError as error:
        found.lines.append(f"{place}: left out, it cannot be listed ({error.strerror})")
        return
    for path in paths:
        end = path.suffix.lower()
        own = path.name in (*WRITTEN, CHECK_PAGE) or path.name.lower() in SYSTEM_FILES
        if own or path.name[0] == "." or path.is_dir():
            continue
        if end not in suffixes:
            others.setdefault(end, []).append(path)
            continue
        try:
            found.media.append(_measure(path, found.captions))
        except (MediaError, DatasetError) as error:
            found.lines.append(f"left out: {error}")
    media = [path for path in paths if path.suffix.lower() in suffixes]
    owned, stems = {caption_path(path, found.captions) for path in media}, {path.stem for path in media}
    for end, of_kind in others.items():
        if end == found.captions.lower():
            alone = [path for path in of_kind if path not in owned]
            doubled = alone and all(Path(path.stem).suffix.lower() in suffixes for path in alone)
            how = f", not cat.mp4{found.captions}: rename them" if doubled else ""
            told = f"{name_some(alone)}: captions of no file. That of cat.mp4 is cat{found.captions}{how}"
            found.lines += [told] if alone else []
            continue
        remedy = remedy_of(end) or LISTS.get(end)
        kind = "neither media nor captions" if remedy is None else f"this kind is not read; {remedy}"
        if of_kind[0].suffix in (CAPTIONS, *OTHER_CAPTIONS) and stems & {path.stem for path in of_kind}:
            kind = f"captions are read from {found.captions} files. Rename them, or in a folder of their own "
            kind += f'give its table in dataset.toml caption_extension = "{of_kind[0].suffix}"'
        found.lines.append(f"{name_some(of_kind)}: left out, {kind}")


def _measure(path: Path, captions: str) -> Media:
    text = read_caption(caption_path(path, captions))
    caption = None if text is None else " ".join(text.split())
    if path.suffix.lower() not in VIDEO_SUFFIXES and not is_animation(path):
        return Media(path, False, image_size(path), None, caption)
    info = source_info(path)
    seconds = None if info.frames is None else info.frames / info.rate
    return Media(path, True, (info.width, info.height), seconds, caption)


def _find_references(folder: Path, places: Sequence[Path], sources: Sequence[Path], found: Found) -> None:
    """Find the folder of references for each folder of pictures: in it, beside it, or beside all of them."""
    whole = folder.absolute()
    beside = [] if sources else [one for one in _sources_in(whole.parent) if one != whole]
    for place in places:
        pictures = [one.path.stem for one in found.media if one.path.parent == place and not one.is_clip]
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
        if one.path.parent == place and not one.is_clip:
            for why in filter(None, map(why_unread, reference_of(one, source))):
                yield f"{one.path.name}: not trained on, its reference cannot be read: {why}"


def _find_numbered(media: Sequence[Media]) -> list[Path]:
    """Return pictures without captions that are named like references of another: cat_0, cat_input."""
    stems = {one.path.stem for one in media if not one.is_clip}
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
    pictures = [one for one in found.media if not one.is_clip]
    tiny = [one.path for one in found.media if min(one.size) < FEW_PIXELS]
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
    return [f"{name_some(names)}: {what}" for what, each in told.items() if (names := list(each))]


def _is_transparent(path: Path) -> bool:
    with contextlib.suppress(MediaError), open_image(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A").getextrema()
            return isinstance(alpha[0], (int, float)) and alpha[0] < 255
    return False


def _is_silent(path: Path) -> bool:
    try:
        return is_animation(path) or track_facts(path) is None
    except MediaError:
        return True


def name_some(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
