"""Paths and addresses (https://, s3://) as users write them, and the usual mistakes in them.

Standard library only. Passwords (`user:password@`) and the query of an address, which may be a signature,
stand in no message, record or name of a file.
"""

import contextlib
import difflib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePath
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

MAX_NAMES = 10_000  # maximum number of names compared with a missing file
MIN_SIMILARITY = 0.6  # minimum similarity of two names without suffix; 1: equal
MAX_NAME_BYTES, MAX_PATH_LENGTH = 255, 4096  # bytes, characters; limits of file systems
QUOTES = tuple("\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb")
# opening quotation mark -> possible closing marks
_PAIRS = (
    *(('"', '"'), ("'", "'"), ("`", "`"), ("\u201c", "\u201d"), ("\u201e", "\u201c\u201d")),
    *(("\u2018", "\u2019"), ("\u201a", "\u2018\u2019"), ("\u00ab", "\u00bb"), ("\u00bb", "\u00ab")),
)
NOTHING = ("none", "null", "nil")  # spellings that leave an option or key unset
_HUB = re.compile(r"(?:hf|huggingface|hub):(?!\\)", re.IGNORECASE)
_BACKSLASH = "\\"
# control characters that TOML and JSON write with a backslash and a letter, as they stand in folders' names
_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\f": "\\f", "\b": "\\b", "\x1b": "\\e"}
_DIGITS = re.compile(r"(\d+)")
_DRIVE = re.compile(r"[A-Za-z]:[\w\\/]")
# a complete part of a path
_VARIABLE = re.compile(r"(?<![^\\/])(?:\$\{\w+\}|\$(?:env:)?[A-Za-z_]\w*|%[A-Za-z_]\w*%)(?![^\\/.])")


def expand_path(text: str, base: Path | None = None) -> Path:
    """Return the path with `~` expanded; a relative path is relative to the folder `base`.

    Quotation marks around the text are removed, because file managers copy paths with them, unless a file
    whose name includes them exists. Raises ValueError with the reason if no file can have the name.
    """
    if "\0" in text:
        raise ValueError("it contains the character NUL (\\u0000), which no file's name can have")
    plain = strip_quotes(text)
    if plain != text and path_exists(Path(text) if base is None else base / text):
        plain = text
    path = Path(plain)
    if plain.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:
            raise ValueError("there is no such user. Write the path out") from None
    path = path if base is None else base / path
    check_length(path)
    return path


def complete_home(text: str) -> str:
    """Return a path with its `~` expanded as in a shell; unchanged if there is no such user."""
    if not text.startswith("~"):
        return text
    with contextlib.suppress(RuntimeError, ValueError):  # unknown or invalid user name
        return str(Path(text).expanduser())
    return text


def is_on_foreign_share(path: PurePath, base: PurePath) -> bool:
    r"""Return whether a path is on a network share (\\machine\share) that `base` is not on.

    Windows logs in to such a machine as soon as it accesses the path, so paths in files that somebody else
    wrote must be checked before they are accessed.
    """
    return path.drive.startswith("\\\\") and path.drive.lower() != base.drive.lower()


def strip_quotes(text: str) -> str:
    """Remove a pair of straight or typographic quotation marks around a text, if it has one."""
    inner = text.strip()
    is_pair = len(inner) > 2 and any(inner[0] == first and inner[-1] in last for first, last in _PAIRS)
    return inner[1:-1] if is_pair else text


def check_length(path: Path) -> None:
    """Raise ValueError if a path is too long for any file system."""
    if len(os.fsencode(path)) > MAX_NAME_BYTES:  # otherwise no part of the path is too long
        longest = max(len(os.fsencode(part)) for part in path.parts)
        if longest > MAX_NAME_BYTES or len(str(path)) > MAX_PATH_LENGTH:
            raise ValueError("no file has so long a name. Pass the path of a file")


def parse_path(folder: Path, path: Path) -> str:
    """Return a path relative to a folder, or absolute if they are on different Windows drives."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return os.path.abspath(path)  # noqa: PTH100


def number_key(name: str) -> tuple[tuple[str | int, ...], str, str]:
    """Return a key that sorts file names with numbers in natural order, ignoring case.

    `2.png` comes before `10.png`, and `a.png` before `B.png`. Names whose numbers are zero-padded to the same
    width sort as plain text. The suffix is compared last.
    """
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    # text, number, text, number, ..., text: so that text is compared with text, and numbers with numbers
    parts = _DIGITS.split(stem.casefold())
    compared = tuple(int(part) if index % 2 else part for index, part in enumerate(parts))
    return compared, suffix.casefold(), name


def sort_by_numbers(paths: Iterable[Path]) -> list[Path]:
    """Return the paths sorted by file name, with numbers in natural order: `a2` before `a10`."""
    return sorted(paths, key=lambda path: number_key(path.name))


def compose_name(name: str) -> str:
    """Return a file name with each accented letter as one character (NFC), as most programs write it.

    Names from a Mac's disk or zip may have a letter and its accent as two characters, and look the same.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def find_spelling(path: Path) -> Path:
    """Return the path or, if only a file exists whose name has its accents written otherwise, that path."""
    if path.name.isascii() or path_exists(path):
        return path
    spellings = [path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD")]
    return next(filter(path_exists, spellings), path)


def path_exists(path: Path) -> bool:
    """Return whether a path exists; False for names that no file can have, where `Path.exists` may raise."""
    return os.path.exists(path)  # noqa: PTH110


def explain_path(text: str) -> str | None:
    """Explain the likely mistake in a path that does not exist; None if it shows no known mistake."""
    if any(character in _ESCAPES for character in text):
        signs = ", ".join(_ESCAPES[character] for character in dict.fromkeys(text) if character in _ESCAPES)
        meant = "".join(_ESCAPES.get(character, character) for character in text)
        forward = meant.replace(_BACKSLASH, "/")
        return (
            f"it contains control characters, as TOML and JSON read {signs} in double quotes. Write a path "
            f"of Windows with forward slashes, {forward}, or in TOML in single quotes, '{meant}'"
        )
    if _ADDRESS.match(text) or _HUB.match(text):
        return "this is an address. Download the file first and pass its path"
    if text.startswith(QUOTES) or text.endswith(QUOTES):
        plain = text.strip("".join(QUOTES))
        return f'quotation marks are part of this path. Write it with straight ones around: "{plain}"'
    if text.strip().lower() in NOTHING:
        return "this word stands for no file, but is read as a path. Omit it"
    if text != text.strip():
        return "this path begins or ends with a space. Remove it"
    match = _VARIABLE.search(text)
    if match is not None and not path_exists(Path(text[: match.end()])):
        return (
            f"{match[0]} is not a folder, and no variable was substituted. Bash and PowerShell replace "
            "$NAME outside of single quotes, cmd replaces %NAME%. Set it, or write the path out"
        )
    if os.name != "nt" and _DRIVE.match(text):
        return "this is a Windows path. Here (in WSL) C: is /mnt/c, and folders are separated by /"
    return None


def explain_missing(path: Path) -> str:
    """Return a hint, after a space, about a path that does not exist; "" if there is none.

    For example, `$MODELS/wan.safetensors` becomes `/wan.safetensors` if the variable is not set.
    """
    if path.is_absolute() and path.parent == Path(path.anchor):
        return f" It is at the very top, in {path.anchor}: is a variable that stood before it not set?"
    if any(mark in str(path) for mark in "*?"):
        return " A pattern that matches no file stays unchanged, and some shells replace none."
    near = similar_path(path)
    return "" if near is None else f" Did you mean {near}?"


def describe_lookup(path: Path) -> str:
    """Return " (looked for at ...)" with the full path of a relative path; "" for an absolute path."""
    return "" if path.is_absolute() else f" (looked for at {path.absolute()})"


def similar_path(path: Path, only_folders: bool = False) -> Path | None:
    """Return a missing path with its first missing part replaced by the most similar existing name.

    The result is None if no name is similar, or if the remaining path does not exist below the similar name.
    """
    missing = next((ancestor for ancestor in (path, *path.parents) if path_exists(ancestor.parent)), path)
    takes_files = not only_folders and path == missing
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(missing.parent) as entries:
        for entry in itertools.islice(entries, MAX_NAMES):
            if takes_files or entry.is_dir():
                names.append(entry.name)
    stem = missing.stem[:MAX_NAME_BYTES]
    for name in difflib.get_close_matches(missing.name[:MAX_NAME_BYTES], names, 5):
        stem_similarity = difflib.SequenceMatcher(None, stem, Path(name).stem).ratio()
        if stem_similarity >= MIN_SIMILARITY:  # otherwise only the suffixes are alike
            similar = missing.with_name(name) / path.relative_to(missing)
            return similar if only_folders or path_exists(similar) else None
    return None


_PLAIN = re.compile(r"[a-z0-9+.-]+://[a-z0-9.:-]*(?:/[^?#]*)?")  # addresses without a query, in lower case
# two letters at least: C:\data is a path
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:://|::)", re.ASCII)
# a protocol is looked for where such letters begin, once: a text of a million of them takes no hours
_SECRETS = re.compile(
    r"((?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]{2,}+:/{1,2})(?:[^\s\"'<>/]*@)?([^\s\"'<>?#]*)(\?[^\s\"'<>]*)?(#[^\s\"'<>]*)?",
    re.ASCII,
)
# parts of a query that sign it: they differ each time that an address of the same file is made
_SIGNATURES = re.compile(
    r"x-(amz|goog|oss|cos|tos)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|expires|policy"
    r"|key-pair-id|token|access_token|hdnts|hdnea|sig",
    re.IGNORECASE,
)
# these belong to a signature only next to `sig`
_AZURE_SIGNATURE_PARTS = re.compile(r"s[eiprtv]|sr[ts]|spr|sip|sdd|sk(oid|tid|t|e|s|v)", re.IGNORECASE)


def is_address(text: str) -> bool:
    """Return whether a text begins with a URL scheme, such as https://."""
    return _ADDRESS.match(text) is not None


def get_scheme(address: str) -> str:
    """Return the scheme of a URL, such as https, in lower case."""
    match = _ADDRESS.match(address)
    assert match is not None
    return match[1].lower()


def split_address(address: str) -> SplitResult:
    """Split a URL into its parts. An invalid one (`http://[::1`) becomes a path; requesting it fails."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult(get_scheme(address), "", address.partition("://")[2], "", "")


def hide_secrets(text: str) -> str:
    """Return a text without the passwords and query strings of its URLs; `?...` replaces a query string."""
    return _SECRETS.sub(lambda match: f"{match[1]}{match[2]}{'?...' if match[3] else ''}", text)


@lru_cache(maxsize=1024)  # called several times for each of a million addresses
def address_identity(address: str) -> str:
    """Return a URL without password, signature and fragment, which identifies its file.

    Do not show it to users: the query may contain a secret of an unknown kind.
    """
    if _PLAIN.fullmatch(address):
        return address
    parts = split_address(address)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    is_azure = any(name.lower() == "sig" for name, _ in pairs)
    pairs = [
        (name, value)
        for name, value in pairs
        if not (_SIGNATURES.fullmatch(name) or (is_azure and _AZURE_SIGNATURE_PARTS.fullmatch(name)))
    ]
    host = parts.netloc.rpartition("@")[2].lower()
    query = f"?{urlencode(pairs)}" if pairs else ""
    return f"{parts.scheme.lower()}://{host}{parts.path}{query}"


def address_name(address: str) -> str:
    """Return the last part of a URL's path, percent-decoded, without query and fragment."""
    path = address.partition("://")[2].partition("?")[0].partition("#")[0].partition("/")[2]
    return unquote(path.rstrip("/").rpartition("/")[2], errors="replace")


def short_hash(identity: str, digits: int = 12) -> str:
    """Return a short hash of a text. With 12 digits, a million texts collide with probability 1 in 500."""
    import hashlib  # imported here, because all options import this file

    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
