"""What a release is made of, step by step: .github/workflows/release.yml runs these, and so can you.

    python -m package.release check-tag v0.1.0
    python -m package.release notes v0.1.0 --pages https://example.org/blob/v0.1.0
    python -m package.release check-files dist
    python -m package.release checksums dist

Standard library only: the steps run before anything is installed.
"""

import hashlib
import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesHeaderParser
from pathlib import Path

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.errors import UserError
from modules.installation import ROOT
from modules.parser import Parser
from modules.version import VERSION

CHANGES = ROOT / "CHANGELOG.md"
CHECKSUMS = "SHA256SUMS"
MAX_NOTES = 125_000  # characters that GitHub accepts as the text of a release
RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def main() -> None:
    """Run one step of a release."""
    parser = Parser(description=__doc__)
    parser.add_argument("step", choices=["check-tag", "notes", "check-files", "checksums"])
    parser.add_argument("of", metavar="TAG|FOLDER", help="tag, such as v0.1.0, or folder of the files")
    parser.add_argument("--pages", default="", help="address of the folder that links of the notes are in")
    args = parser.parse_args()
    if args.step == "check-tag":
        check_tag(args.of)
    elif args.step == "notes":
        sys.stdout.write(cut_notes(args.of, CHANGES.read_text(encoding="utf-8"), args.pages))
    elif args.step == "check-files":
        check_files(Path(args.of))
    else:
        write_checksums(Path(args.of))


def check_tag(tag: str) -> None:
    """Raise UserError if a tag does not name the version in pyproject.toml."""
    if tag != f"v{VERSION}":
        raise UserError(f"The tag {tag} is not v{VERSION}, the version in pyproject.toml. Change one of them")


def cut_notes(tag: str, changes: str, pages: str = "") -> str:
    """Return the section about a version in the changelog.

    Args:
        tag: The git tag: the version with a `v` in front.
        changes: The text of CHANGELOG.md. A version begins with a heading such as `## 0.1.0 (2026-12-24)`.
        pages: Base URL put before relative links, which a release's page cannot resolve.

    Raises:
        UserError: If the version has no section, an empty one, or more text than a release can have.
    """
    version = tag.removeprefix("v")
    sections = re.split(r"(?m)^## ", changes)
    matching = [section for section in sections if section.split()[:1] == [version]]
    text = matching[0].partition("\n")[2].strip() if matching else ""
    if not text:
        raise UserError(
            f"CHANGELOG.md has no section about {version}. It begins with a line `## {version} (DATE)`: "
            "rename `## Unreleased`"
        )
    if pages:
        text = RELATIVE_LINK.sub(rf"]({pages.rstrip('/')}/\1)", text)
    if len(text) > MAX_NOTES:
        raise UserError(
            f"The notes of {version} have {len(text)} characters of at most {MAX_NOTES}. Shorten them"
        )
    return f"{text}\n"


def check_files(folder: Path) -> None:
    """Raise UserError unless a folder contains exactly one wheel and one source archive of this version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {"Name": project["name"], "Version": VERSION}
    stem = f"{project['name'].replace('-', '_')}-{VERSION}"
    names = {f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"}
    found_names = {path.name for path in _list_files(folder)}
    if found_names != names:
        raise UserError(
            f"{folder} contains {', '.join(sorted(found_names)) or 'nothing'}, not "
            f"{' and '.join(sorted(names))}"
        )
    for name in sorted(names):
        metadata = _read_metadata(folder / name)
        if metadata != expected:
            raise UserError(
                f"{folder / name} says {metadata}, not {expected}. Build it again from this commit"
            )


def write_checksums(folder: Path) -> None:
    """Write a folder's file SHA256SUMS, which `sha256sum --check` reads.

    Raises:
        UserError: If the folder does not exist or is empty.
    """
    files = [path for path in _list_files(folder) if path.name != CHECKSUMS]
    if not files:
        raise UserError(f"{folder} contains no file. Build into it: python -m build --outdir {folder}")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    # bytes: on Windows a text would have \r\n, which sha256sum treats as part of the names
    (folder / CHECKSUMS).write_bytes("".join(lines).encode())


def _list_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder. Build into it: python -m build --outdir {folder}"
        )
    return sorted(path for path in folder.iterdir() if path.is_file())


def _read_metadata(path: Path) -> dict[str, str]:
    """Return the name and version in the metadata of a wheel or source archive."""
    stem = "-".join(path.name.removesuffix(".tar.gz").split("-")[:2])
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(f"{stem}.dist-info/METADATA")
    else:
        with tarfile.open(path) as archive:
            file = archive.extractfile(f"{stem}/PKG-INFO")
            content = file.read() if file is not None else b""
    headers = BytesHeaderParser().parsebytes(content)
    return {name: str(headers[name]) for name in ("Name", "Version")}


if __name__ == "__main__":
    command_line(main, needs_packages=False)
