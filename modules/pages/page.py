"""Write an HTML page: one file that needs no server, runs no script but `page.js`, and fetches nothing.

A page is a Jinja2 template next to the code that fills it. It extends `base.html` of this folder:

    {% extends "base.html" %}{% block body %}<p>{{ prompt }}</p>{% endblock %}

`pages.css` styles all pages. A page with commands to copy shows `{{ script }}` in `{% block script %}`.

Every value is escaped; only `Markup` (images and clips embedded here as data, and charts) is HTML.

`{{ _("step %(step)s", step=3) }}` is a text in the language of the page, which `language.py` describes, and
`{{ counted(n, "%(n)s run", "%(n)s runs") }}` one of two. Such text may contain HTML; its values are escaped.
"""

import base64
import functools
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import cv2
import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from modules.atomic_write import write_text
from modules.command import quote_command
from modules.control_codes import escape_control_codes
from modules.media.colors import Frame
from modules.pages.language import TranslatableText, fill_counted, fill_template, language
from modules.run_limits import temporary_folder

# Templates enclose what a copy for others must not contain in these, and `mark_folders` does so in all texts
# of a page; escaped text cannot contain them.
PRIVATE, END = Markup("<!--private-->"), Markup("<!--/private-->")
# One folder's name and what separates it from the next. Names may contain spaces, but no option, and
# nothing after a script: then it is a command, and other paths may follow.
_SEGMENT = r"""[^\\/\s:*?"<>|](?:(?:(?!\s--?[A-Za-z]|(?<=\.py)'?\s)[^\\/\n:*?"<>|])*[^\\/\s:*?"<>|])?[\\/]+"""
# folders at the root of a machine: after a letter or a dot, a slash begins a path only with one of these
_ROOTS = (
    "home|users|root|mnt|media|tmp|var|opt|srv|usr|etc|private|volumes|workspace|scratch|data|"
    "documents and settings"
)
# where a path of a machine begins
_BEGINNINGS = (
    r"file:[\\/]*(?:[A-Za-z]:)?[\\/]*+",  # an address of a file
    r"(?<![A-Za-z])[A-Za-z]:[\\/]++|[A-Za-z]:\\++",  # a drive; after a letter, with a backslash
    r"(?<!\\)[\\]{2,}+(?:[?.]\\(?:UNC\\|[A-Za-z]:\\)?)?",  # a share, or Windows' long form of a path
    r"~[\w.-]*+[\\/]++",  # the home folder of a user
    r"(?<![\w./\\])(?:\.\.[\\/]++)++",  # a folder beside the one of the command
    r"\$\{?\w++\}?[\\/]++",  # a variable, as $HOME
    r"(?<![\w/\\.~])[\\/]++",  # also after a colon, as in image:/a/b
    rf"(?<![/\\])[\\/]++(?=(?:{_ROOTS})[\\/])",
)
# after the folder of all users: each name is that of a person
_USER = r"""(?:(?<=[\\/]home[\\/])|(?<=[\\/]users[\\/])|(?<=[\\/]settings[\\/]))[^\\/\s:*?"'<>|,;)\]]+"""
_SERVERS = r"""\b(?:https?|ftp|wss?|s3|gs|hf)://[^\s"'<>]*"""  # addresses of servers, which stay
_HOME = r"(?<![\w~./\\])~[a-z_](?:[\w.-]*\w)?[\\/]*+"  # the home folder of a user, named by itself
_FOLDERS = re.compile(
    rf"(?P<server>{_SERVERS})|(?:{'|'.join(_BEGINNINGS)})(?:{_SEGMENT})+(?:{_USER})?|{_HOME}", re.IGNORECASE
)


def mark_folders(value: Any) -> Any:
    """Return a text or path of a page with the folders of absolute paths marked as private.

    Control codes, which could hide or reorder the text, are written out. Values of other types, and text that
    is escaped already, are returned as they are.
    """
    if isinstance(value, TranslatableText):  # in the language of the page
        value = value.translated()
    if isinstance(value, Markup) or not isinstance(value, (str, Path)):
        return value
    text = escape_control_codes(str(value))
    if not any(sign in text for sign in "/\\~"):
        return text  # most texts of a page
    marked: list[Markup] = []
    end = 0  # of the part of the text that is in `marked`
    for folder in _FOLDERS.finditer(text):
        if folder["server"]:  # an address of a server is not private
            continue
        marked += [escape(text[end : folder.start()]), PRIVATE, escape(folder[0]), END]
        end = folder.end()
    return Markup("").join([*marked, escape(text[end:])]) if marked else text


HERE = Path(__file__).resolve().parent
SHEET, SCRIPT = (
    Markup((HERE / name).read_text(encoding="utf-8").removesuffix("\n")) for name in ("pages.css", "page.js")
)


def encode_address(value: str | Mapping[str, object]) -> str:
    """Percent-encode a part of a path, or the fields of a query, for a URL.

    This replaces Jinja's own filter, which raises for file names that are not UTF-8.
    """
    if isinstance(value, str):
        return quote(_encode_name(value))
    return urlencode({name: _encode_name(str(text)) for name, text in value.items()})


def _encode_name(name: str) -> bytes:
    """Encode a file name; lone surrogates that do not stand for a byte of the name become escapes."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace")


def _translate(text: str, /, **values: Any) -> Markup:
    return fill_template(text, **{name: mark_folders(value) for name, value in values.items()})


def _count(number: int, singular: str, plural: str, /, **values: Any) -> Markup:
    marked = {name: mark_folders(value) for name, value in values.items()}
    return fill_counted(number, singular, plural, **marked)


_UNSCRIPTED = {
    "mp4": Markup('<noscript><video src="{}" controls muted loop preload="metadata"></video></noscript>'),
    "wav": Markup('<noscript><audio src="{}" controls preload="none"></audio></noscript>'),
}
_UNSCRIPTED_IMAGE = Markup('<noscript><img src="{}" alt="" loading="lazy"></noscript>')


def show_unscripted(address: str) -> Markup:
    """Return a `noscript` element that shows an image, video or audio file without the page's script."""
    return _UNSCRIPTED.get(address.rpartition(".")[2], _UNSCRIPTED_IMAGE).format(address)


@functools.cache
def _load_templates(folders: tuple[Path, ...]) -> jinja2.Environment:  # each template is compiled once
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=mark_folders,
    )
    environment.filters["urlencode"] = encode_address
    environment.globals |= {"_": _translate, "counted": _count, "language": language}
    environment.globals["unscripted"] = show_unscripted
    return environment


# what a page may do: load nothing, run `page.js` alone, even if a text were not escaped
FILE_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)


def write_page(path: Path, template: Path, title: str, values: Mapping[str, Any]) -> None:
    """Render a template and write the page atomically. Raises OutputError if it cannot be written."""
    write_text(path, render_page(template, title, values))


def render_page(
    template: Path,
    title: str,
    values: Mapping[str, Any],
    policy: str = FILE_POLICY,
    folders: Sequence[Path] = (),
) -> str:
    """Return a page rendered from a template; the values are escaped.

    Args:
        template: Path of the template; with `folders`, its path below one of them.
        title: Title of the page.
        values: Values that the template uses.
        policy: Content security policy: what the page may load and run.
        folders: Folders of templates that may include each other; by default, the one of `template`.

    Raises:
        jinja2.UndefinedError: If the template uses a value that is missing.
    """
    values = {
        **values,
        "reelsmith": quote_command(["python", "reelsmith.py"]),
        "sheet": SHEET,
        "script": SCRIPT,
    }
    if not isinstance(title, TranslatableText):  # its translation is escaped where it is shown
        title = escape_control_codes(title)
    context = {**values, "title": title, "policy": policy}
    if not folders:
        folders = [template.parent]
        template = Path(template.name)
    return _load_templates(tuple(folders)).get_template(template.as_posix()).render(context)


CLIP_CRF = 24  # smaller than what is kept: a page contains many clips


def embed_image(frame: Frame, text: str, largest_side: int = 512, quality: int = 85) -> Markup:
    """Return an HTML image tag with a frame (H W 3) embedded as JPEG; `text` is the alternative text.

    A frame whose longer side exceeds `largest_side` pixels is reduced.
    """
    image = Image.fromarray(reduce_frame(frame, largest_side))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=quality)
    return Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(
        as_url("image/jpeg", data.getvalue()), text, image.width, image.height
    )


def embed_clip(frames: Sequence[Frame], fps: float, text: str, largest_side: int = 512) -> Markup:
    """Return an HTML tag that plays the frames (each H W 3) in a loop; a single frame becomes an image.

    Frames whose longer side exceeds `largest_side` pixels are reduced.

    Raises:
        MediaError: If there is no frame.
    """
    if len(frames) == 1:
        return embed_image(frames[0], text, largest_side)
    from modules.media.writing import write_video

    with temporary_folder() as folder:
        path = folder / "clip.mp4"
        reduced = (reduce_frame(frame, largest_side) for frame in frames)
        write_video(path, reduced, fps, crf=CLIP_CRF, preset="veryfast")
        data = path.read_bytes()
    return Markup('<video src="{}" aria-label="{}" autoplay loop muted playsinline></video>').format(
        as_url("video/mp4", data), text
    )


def reduce_frame(frame: Frame, largest_side: int) -> Frame:
    """Downscale a frame (H W 3) until its longer side is at most `largest_side` pixels."""
    height, width = frame.shape[:2]
    scale = largest_side / max(height, width)
    if scale >= 1:
        return frame
    size = (max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def link(*parts: str) -> str:
    """Return the relative URL of a file.

    `parts` are its folders and its name.
    """
    return "./" + "/".join(quote(_encode_name(part), safe="") for part in parts)


def as_url(kind: str, data: bytes) -> str:
    """Return data as a `data:` URL; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
