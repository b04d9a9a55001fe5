"""Find the tokenizer of a text encoder (named by an option, near its weights, or on the hub) and read it.

Also check by how much its normalizer may lengthen a text: a small file could turn a prompt into terabytes.
"""

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints.first_bytes import describe_kind, is_pointer_or_page
from checkpoints.opening import fingerprint
from modules.errors import CheckpointError, catch_panics
from modules.limits import MAX_TOKENIZER_BYTES, MAX_TOKENIZER_GROWTH
from modules.paths import explain_missing
from modules.text_files import read_content, require_regular_file
from modules.varints import read_varint

SUFFIXES = (".json", ".model")


@dataclass(frozen=True)
class TokenizerFiles:
    """File names of a text encoder's tokenizer, and the folders in which to look for them."""

    option: str  # such as "--t5_tokenizer"
    names: tuple[str, ...]  # file names; the first that exists is used
    folder: str  # folder of the tokenizer in the repository; "" for the top
    repository: str  # on the hub
    folders: tuple[str, ...]  # folders to search, relative to the encoder's; ".." only as the first part
    # token that only this tokenizer has; it identifies files in folders that models share
    unique_token: str = ""
    hub_filename: str = "tokenizer.json"  # name of the file to download
    # subset of `folders` that may contain tokenizers of other models too
    ambiguous_folders: tuple[str, ...] = (".",)

    def find(self, path: Path | None, checkpoint_path: Path) -> Path | None:
        """Return the tokenizer file, or None if no file is found.

        Args:
            path: Value of the option, a file or folder; None searches `folders` next to the text encoder.
            checkpoint_path: File or folder of the text encoder.

        Raises:
            CheckpointError: If `path` does not exist, or if it is a folder without a tokenizer.
        """
        if path is not None:
            return self._find_from_option(path)
        folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent
        for relative_folder in self.folders:
            first_folder, *inner_folders = relative_folder.split("/")
            candidate = folder.parent if first_folder == ".." else folder / first_folder
            file = self._find_file(candidate.joinpath(*inner_folders))
            if file is None:
                continue
            # one folder may contain single-file encoders of several models, together with their tokenizers
            may_be_another_model = relative_folder in self.ambiguous_folders and not checkpoint_path.is_dir()
            if not may_be_another_model or self.unique_token.encode() in self.read_bytes(file):
                return file
        return None

    def check_option_value(self, path: Path) -> None:
        """Raise CheckpointError if the option's file does not start like a tokenizer file."""
        file = self._find_from_option(path)
        self.check_bytes(file)
        try:
            with file.open("rb") as opened:
                start = opened.read(64)
        except OSError as error:
            raise self.unreadable(file, error) from error
        if not start:
            raise self.unreadable(file, ValueError("it is empty"))
        if is_pointer_or_page(start):
            raise CheckpointError(f"{self.option} {file} {describe_kind(start)}", file)
        if file.suffix == ".json" and start.lstrip()[:1] != b"{":
            raise self.unreadable(file, ValueError("it is not JSON"))
        if file.suffix not in SUFFIXES:
            raise self.unreadable(file, ValueError(f"its extension is not one of {', '.join(SUFFIXES)}"))

    def identity(self, file: Path | None) -> str:
        """Return what identifies a tokenizer in cache records; `file` None means the tokenizer on the hub."""
        if file is not None:
            return fingerprint(file)
        return f"{self.repository}/{self.folder}" if self.folder else self.repository

    def download(self, checkpoint_path: Path, may_download: bool = True) -> Path:
        """Return the path of the tokenizer in the hub's cache; download it if it is not in the cache.

        Raises:
            CheckpointError: If the cache lacks the tokenizer, and the hub cannot be reached or `may_download`
                is False.
        """
        from huggingface_hub import hf_hub_download  # rarely needed, and takes 0.1 s to import

        try:
            return Path(
                hf_hub_download(
                    self.repository,
                    self.hub_filename,
                    subfolder=self.folder or None,
                    local_files_only=not may_download,
                )
            )
        except Exception as error:  # the hub's client raises many classes for a missing connection
            reason = "the hub's cache has none"
            if may_download:
                reason = f"the hub cannot be reached ({first_line(error)})"
            raise CheckpointError(
                f"no tokenizer for {checkpoint_path}: there is none next to it or inside it, and {reason}\n"
                f"  Pass {self.option} {self._describe()}.",
                checkpoint_path,
            ) from error

    def read(self, file: Path, content: bytes | None = None) -> Tokenizer:
        """Read a tokenizer.json; the returned tokenizer does not pad or truncate.

        `content` contains the bytes of the tokenizer.json if it is stored inside another file, `file`.

        Raises:
            CheckpointError: If the tokenizer cannot be read.
        """
        if content is None:
            self.check_bytes(file)
        with self.convert_errors(file):
            tokenizer = Tokenizer.from_file(str(file)) if content is None else Tokenizer.from_buffer(content)
            if tokenizer.normalizer is not None:
                growth = _measure_growth(json.loads(tokenizer.normalizer.__getstate__()))
                if growth > MAX_TOKENIZER_GROWTH:
                    raise _make_growth_error(growth)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def read_bytes(self, file: Path) -> bytes:
        """Return the content of a tokenizer file.

        Raises:
            CheckpointError: If the file is too large or cannot be read.
        """
        try:
            return read_content(file, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise self.unreadable(file, OSError(error.strerror)) from error

    def check_bytes(self, file: Path) -> None:
        """Raise CheckpointError if a tokenizer file is too large or not a regular file."""
        try:
            require_regular_file(file, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise self.unreadable(file, OSError(error.strerror)) from error

    @contextlib.contextmanager
    def convert_errors(self, file: Path) -> Iterator[None]:
        """Turn errors that the tokenizer library raises in the `with` block into CheckpointError."""
        try:
            with catch_panics():
                yield
        except CheckpointError:
            raise
        except Exception as error:  # the library raises nothing more precise
            raise self.unreadable(file, error) from error

    def unreadable(self, file: Path, error: Exception) -> CheckpointError:
        """Return the error for a file that is not a tokenizer; it names the option and the accepted files."""
        return CheckpointError(
            f"{file} cannot be read as a tokenizer ({first_line(error)}). Pass {self.option} "
            f"{self._describe()}.",
            file,
        )

    def _find_from_option(self, path: Path) -> Path:
        """Return the tokenizer file for the option's value, which is the file itself or a folder."""
        if not path.is_dir():
            try:
                require_regular_file(path)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.option} {path}: there is no such file or folder.{explain_missing(path)}", path
                ) from None
            except OSError as error:
                raise self.unreadable(path, OSError(error.strerror)) from error
            return path
        # folders that begin with .. are next to an encoder's folder, not inside the option's folder
        inner_folders = [path / folder for folder in self.folders if not folder.startswith("..")]
        for candidate in (path, *inner_folders):
            file = self._find_file(candidate)
            if file is not None:
                return file
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{self.option} {path}: the folder has none of {', '.join(self.names)} (it contains {names}). "
            f"Pass {self._describe()}.",
            path,
        )

    def _find_file(self, folder: Path) -> Path | None:
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def _describe(self) -> str:
        """Describe the tokenizer files that are accepted, for the end of an error message."""
        source = f"the files of {self.repository}"
        if self.folder:
            source = f"the folder {self.folder} of {self.repository}"
        return f"{source} (or its {' or '.join(self.names[:2])})"


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# first byte of a vocabulary item (piece) in a SentencePiece model: field 1, wire type 2 (length)
_PIECE = 1 << 3 | 2


def check_sentencepiece(model: bytes) -> None:
    """Raise ValueError if a SentencePiece model is damaged or could lengthen a text too much.

    Its normalizer may make a text at most MAX_TOKENIZER_GROWTH times longer. Source:
    sentencepiece_model.proto: NormalizerSpec is field 3 of ModelProto, and precompiled_charsmap its field 2.
    """
    for specification in _read_field(model, 3):
        for charsmap in _read_field(specification, 2):
            growth = _measure_charsmap(charsmap)
            if growth > MAX_TOKENIZER_GROWTH:
                raise _make_growth_error(growth)


def piece_surfaces(encoded: bytes) -> list[str]:
    """Return the text of each token (piece) in a tokenized text.

    If the bytes of one character are separate pieces, only the last piece has the character. Source:
    sentencepiece.proto: pieces are field 2 of SentencePieceText, and the surface is field 3 of a piece.

    Args:
        encoded: A serialized SentencePieceText.
    """
    surfaces = []
    for piece in _read_field(encoded, 2):
        surface = b"".join(_read_field(piece, 3))
        surfaces.append(surface.decode("utf-8", "replace"))
    return surfaces


def _make_growth_error(growth: float) -> ValueError:
    """Return the error for a normalizer that can expand a character to too many characters."""
    return ValueError(
        f"its normalizer makes {growth:.0f} characters of one, {MAX_TOKENIZER_GROWTH} are the most"
    )


def _measure_growth(normalizer: Mapping[str, Any]) -> float:
    """Return the largest number of characters that a tokenizer.json normalizer may produce from one."""
    match normalizer.get("type"):
        case "Sequence":
            product = 1.0
            for inner in normalizer["normalizers"]:
                product *= _measure_growth(inner)
            return product
        case "Replace":
            pattern = normalizer["pattern"]
            if "String" in pattern:
                return max(1.0, len(normalizer["content"]) / max(1, len(pattern["String"])))
            # a regular expression may match between any two characters
            return 1.0 + len(normalizer["content"])
        case "Prepend":
            return 1.0 + len(normalizer["prepend"])
        case "Precompiled":
            return _measure_charsmap(base64.b64decode(normalizer["precompiled_charsmap"]))
    return 1.0  # Unicode normalization and case folding lengthen a text only by a small factor


def _measure_charsmap(charsmap: bytes) -> float:
    """Return the length in bytes of the longest replacement in SentencePiece's charsmap."""
    # A charsmap is the size of an index (4 bytes), the index, and strings that end in NUL.
    index_bytes = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + index_bytes :].split(b"\0")
    return float(max(map(len, texts)))


def _read_field(message: bytes, number: int) -> Iterator[bytes]:
    """Yield the values (strings or nested messages) of one field of a serialized protobuf message."""
    # Source: protobuf.dev, "Encoding".
    offset = 0
    last = len(message) - 1
    try:
        while offset <= last:
            # skip short vocabulary items without function calls: umT5 has 256,000 of them
            while offset < last and message[offset] == _PIECE and message[offset + 1] < 0x80:
                offset += 2 + message[offset + 1]
            if offset == last + 1:  # the message ends with a vocabulary item
                return
            key, offset = read_varint(message, offset)
            wire_type = key & 7
            match wire_type:
                case 0:  # varint
                    _, offset = read_varint(message, offset)
                case 1:  # 64 bits
                    offset += 8
                case 2:  # a length, then this many bytes
                    length, offset = read_varint(message, offset)
                    if key >> 3 == number:
                        yield message[offset : offset + length]
                    offset += length
                case 5:  # 32 bits
                    offset += 4
                case _:
                    raise ValueError(f"a field of the unknown type {wire_type}")
    except IndexError:
        raise ValueError("it ends inside a field") from None
