"""Show what videos, images, latents and LoRAs say about how they were made."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.control_codes import escape_control_codes, shorten
from modules.errors import MediaError, UserError
from modules.options import Options, option
from modules.script_options import parse_options
from modules.text_files import read_safetensors_texts

TENSORS = ".safetensors"
VIDEOS = frozenset({".mkv", ".mp4", ".mov", ".webm", ".m4v"})
PREFIX = "bt_"  # of entries about the generation
LEADING_NAMES = (  # entries that are shown first, in this order
    "model_type",
    "task",
    "prompt",
    "negative_prompt",
    "seeds",
    "infer_steps",
    "embedded_cfg_scale",
    "guidance_scale",
    "guidance_scale_high_noise",
    "timestep_boundary",
    "cfg_schedule",
    "fps",
)
# metadata keys that FFmpeg writes into every file
CONTAINER_KEYS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time"})
MAX_VALUE_LENGTH = 20_000  # characters in a line; training notes of LoRA files can take megabytes


class MetaviewOptions(Options):
    """Command-line options of metaview: the files to read and how to show their metadata."""

    input_file: tuple[Path, ...] = option(
        "videos (mkv, mp4, mov), images (png), latents and LoRAs (safetensors), or folders of them",
        positional=True,
        nargs="+",
        metavar="FILE",
    )
    json: bool = option(
        "print JSON: an object for one file, a list for several or a folder; values as they are stored"
    )


@dataclass(frozen=True)
class FileInfo:
    """Metadata of one file, or the error that occurred when reading it."""

    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the metadata of all files as lines or JSON.

    Files without metadata are listed on stderr. Raises MediaError at the end if files could not be read.
    """
    (options,) = parse_options(__doc__, argv, MetaviewOptions)
    files = [read_file_info(path) for path in list_files(options.input_file)]
    is_one = len(options.input_file) == 1 and not options.input_file[0].is_dir()
    lines = list(as_json(files, is_one)) if options.json else list(as_lines(files, is_one))
    if lines:
        sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    for info in files:
        if not info.error and not info.metadata and not options.json:
            sys.stderr.write(f"{escape_control_codes(str(info.path))} contains no metadata\n")
    failed = [info.error for info in files if info.error]
    if failed:
        raise MediaError("\n".join(failed))


def list_files(paths: Sequence[Path]) -> list[Path]:
    """List the given files, and all files in given folders that may contain metadata, sorted by name."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        suffixes = VIDEOS | {TENSORS, ".png", ".wav"}
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
        if not inside:
            raise MediaError(f"{path} contains no video, PNG, WAV or safetensors file. Pass another folder")
        files += inside
    return files


def read_file_info(path: Path) -> FileInfo:
    """Read the metadata of a file; on failure, the result's `error` is set."""
    from modules.media.reading import read_tags  # with the libraries for images and videos

    try:
        if path.suffix.lower() == TENSORS:
            return FileInfo(path, read_safetensors_texts(path))
        tags = read_tags(path)
    except UserError as error:
        return FileInfo(path, error=str(error))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return FileInfo(path, error=f"{path} cannot be read: {reason}")
    return FileInfo(path, {name: text for name, text in tags.items() if name not in CONTAINER_KEYS})


def as_json(files: Sequence[FileInfo], is_one: bool) -> Iterator[str]:
    """Yield the metadata as ASCII JSON, with keys and values exactly as stored; `is_one`: not in a list."""
    objects = []
    for info in files:
        content: dict[str, object] = {"file": str(info.path)}
        if info.error:
            content["error"] = info.error
        else:
            content["metadata"] = dict(info.metadata)
        objects.append(content)
    yield json.dumps(objects[0] if is_one else objects, indent=2)


def as_lines(files: Sequence[FileInfo], is_one: bool) -> Iterator[str]:
    """Yield `NAME: value` lines; unless `is_one`, under each file's path, with empty lines between files."""
    for index, info in enumerate(files):
        if info.error:
            continue
        if not is_one:
            yield from ([""] if index else [])
            yield escape_control_codes(str(info.path))
        for name, text in sort_metadata(info.metadata):
            yield f"{_as_line(name)}: {_as_line(text)}"


def sort_metadata(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Sort metadata: first the generation's settings, with names in capitals, then all other entries by name.

    Settings of the generation have a prefix, in lower or upper case. An entry that is stored with and
    without it is returned once. Latent files of FramePack have no prefixes; all of their entries are
    settings.
    """
    prefixed = {name: text for name, text in metadata.items() if name.lower().startswith(PREFIX)}
    settings = {name.lower().removeprefix(PREFIX): text for name, text in prefixed.items()}
    others = {name: text for name, text in metadata.items() if name not in prefixed}
    if not settings and {"seeds", "prompt"} <= others.keys():  # a latent file of FramePack
        settings = others
        others = {}
    others = {name: text for name, text in others.items() if settings.get(name) != text}
    leading = [name for name in LEADING_NAMES if name in settings]
    following = sorted(settings.keys() - set(leading))
    return [(name.upper(), settings[name]) for name in (*leading, *following)] + sorted(others.items())


def _as_line(text: str) -> str:
    """Return a text as one line without control characters, which could affect a terminal."""
    plain = text.replace("\r\n", "\n").replace("\n", "\\n").replace("\t", "\\t")
    return shorten(escape_control_codes(plain), MAX_VALUE_LENGTH)


if __name__ == "__main__":
    command_line(main)
