"""Find the tokenizer of a text encoder (given, in or next to its folder, on the hub) and read it.

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
    """The files that make up the tokenizer of one text encoder, and where they may be."""

    option: str  # "--t5_tokenizer"
    names: tuple[str, ...]  # any of these files is one; the first that exists is used
    folder: str  # its folder in the repository on the hub; "" for the top
    repository: str  # on the hub
    folders: tuple[str, ...]  # folders to search, relative to the encoder's; ".." only in front
    # must occur in a file that is in a shared place next to a single-file encoder
    token: str = ""
    on_hub: str = "tokenizer.json"  # the file that is downloaded
    shared: tuple[str, ...] = (".",)  # of `folders`: where tokenizers of other models may be too

    def find(self, path: Path | None, checkpoint_path: Path) -> Path | None:
        """Return the tokenizer's file: the option's, or the first one next to or inside the model's folder.

        `path` is the option's value. A file in a folder that models share has to contain the token that only
        this tokenizer has.

        Returns:
            None if no file is found.

        Raises:
            CheckpointError: If `path` is given but is not a tokenizer.
        """
        if path is not None:
            return self._describe_given(path)
        folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent
        for relative in self.folders:
            parts = relative.split("/")
            file = self._find_file(
                folder.parent.joinpath(*parts[1:]) if parts[0] == ".." else folder.joinpath(*parts)
            )
            may_belong_to_others = relative in self.shared and not checkpoint_path.is_dir()
            if file is not None and not (
                may_belong_to_others and self.token.encode() not in self.read_bytes(file)
            ):
                return file
        return None

    def check_given(self, path: Path) -> None:
        """Raise CheckpointError if `path`, which the option names, is not a tokenizer by its first bytes."""
        file = self._describe_given(path)
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
            raise self.unreadable(file, ValueError(f"its name ends in none of {', '.join(SUFFIXES)}"))

    def identity(self, file: Path | None) -> str:
        """Return a tokenizer's identity for cache records.

        Args:
            file: None for the hub's.
        """
        return (
            fingerprint(file) if file is not None else "/".join(filter(None, (self.repository, self.folder)))
        )

    def download(self, checkpoint_path: Path, may_download: bool = True) -> Path:
        """Return the path of the hub's tokenizer file, downloaded if the cache lacks it.

        Raises:
            CheckpointError: If the cache lacks it and the hub cannot be reached, or `may_download` is off.
        """
        from huggingface_hub import hf_hub_download  # seldom needed, and 0.1 s to import

        try:
            return Path(
                hf_hub_download(
                    self.repository,
                    self.on_hub,
                    subfolder=self.folder or None,
                    local_files_only=not may_download,
                )
            )
        except Exception as error:  # no network, no such host, a proxy's answer: many classes, one remedy
            reached = f"the hub cannot be reached ({first_line(error)})"
            why = reached if may_download else "the hub's cache has none"
            raise CheckpointError(
                f"no tokenizer for {checkpoint_path}: there is none next to it or inside it, and {why}\n"
                f"  Give {self.option} {self._describe()}.",
                checkpoint_path,
            ) from error

    def read(self, file: Path, content: bytes | None = None) -> Tokenizer:
        """Read the tokenizer of a tokenizer.json, without padding and truncation.

        `content` is the bytes of the tokenizer.json, if it is inside `file`.

        Raises:
            CheckpointError: If it cannot be read.
        """
        if content is None:
            self.check_bytes(file)
        with self.explain(file):
            tokenizer = Tokenizer.from_file(str(file)) if content is None else Tokenizer.from_buffer(content)
            if tokenizer.normalizer is not None:
                _check(_measure_growth(json.loads(tokenizer.normalizer.__getstate__())))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def read_bytes(self, file: Path) -> bytes:
        """Read a file of a tokenizer.

        Raises:
            CheckpointError: If it is too large or cannot be read.
        """
        try:
            return read_content(file, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise self.unreadable(file, OSError(error.strerror)) from error

    def check_bytes(self, file: Path) -> None:
        """Raise CheckpointError if a file is larger than any tokenizer, or not a regular file."""
        try:
            require_regular_file(file, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise self.unreadable(file, OSError(error.strerror)) from error

    @contextlib.contextmanager
    def explain(self, file: Path) -> Iterator[None]:
        """Turn errors that the library raises in the block into CheckpointError."""
        try:
            with catch_panics():
                yield
        except CheckpointError:
            raise
        except Exception as error:  # the library raises nothing more precise
            raise self.unreadable(file, error) from error

    def unreadable(self, file: Path, error: Exception) -> CheckpointError:
        """Return the error for a file that is not a tokenizer; it names the option and the right files."""
        return CheckpointError(
            f"{file} cannot be read as a tokenizer ({first_line(error)}). Give {self.option} "
            f"{self._describe()}.",
            file,
        )

    def _describe_given(self, path: Path) -> Path:
        """Return the tokenizer's file that the option names, itself or by its folder."""
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
        # folders that begin with .. are places next to a model's file, not in a given folder
        inner_folders = [path / folder for folder in self.folders if not folder.startswith("..")]
        for candidate in (path, *inner_folders):
            file = self._find_file(candidate)
            if file is not None:
                return file
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{self.option} {path}: the folder has none of {', '.join(self.names)} (it holds {names}). Give "
            f"{self._describe()}.",
            path,
        )

    def _find_file(self, folder: Path) -> Path | None:
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def _describe(self) -> str:
        place = (
            f"the folder {self.folder} of {self.repository}"
            if self.folder
            else f"the files of {self.repository}"
        )
        return f"{place} (or its {' or '.join(self.names[:2])})"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its class name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_PIECE = 1 << 3 | 2  # the key of a piece of the vocabulary, field 1


def check_sentencepiece(model: bytes) -> None:
    """Raise ValueError if a SentencePiece model is damaged, or could lengthen a text too much.

    Its normalizer may make a text at most MAX_TOKENIZER_GROWTH times longer. Source:
    sentencepiece_model.proto, ModelProto and NormalizerSpec.
    """
    for specification in _read_entries(model, 3):
        for charsmap in _read_entries(specification, 2):
            _check(_measure_charsmap(charsmap))


def piece_surfaces(encoded: bytes) -> list[str]:
    """Return the characters that each piece stands for.

    If the bytes of one character are separate pieces, only the last of these has the character. Source:
    sentencepiece.proto.

    Args:
        encoded: A SentencePieceText as bytes.
    """
    return [
        b"".join(_read_entries(piece, 3)).decode("utf-8", "replace") for piece in _read_entries(encoded, 2)
    ]


def _check(growth: float) -> None:
    if growth > MAX_TOKENIZER_GROWTH:
        raise ValueError(
            f"its normalizer makes {growth:.0f} characters of one, {MAX_TOKENIZER_GROWTH} are the most"
        )


def _measure_growth(normaliser: Mapping[str, Any]) -> float:
    """Return how many characters one can become at most; 1 for Unicode's forms and unknown steps."""
    match normaliser.get("type"):
        case "Sequence":
            product = 1.0
            for inner in normaliser["normalizers"]:
                product *= _measure_growth(inner)
            return product
        case "Replace":
            pattern = normaliser["pattern"]
            if "String" in pattern:
                return max(1.0, len(normaliser["content"]) / max(1, len(pattern["String"])))
            # a regular expression may match between any two characters
            return 1.0 + len(normaliser["content"])
        case "Prepend":
            return 1.0 + len(normaliser["prepend"])
        case "Precompiled":
            return _measure_charsmap(base64.b64decode(normaliser["precompiled_charsmap"]))
    return 1.0


def _measure_charsmap(charsmap: bytes) -> float:
    """Return the length of the longest replacement text in a charsmap of SentencePiece.

    The bytes are the size of an index, the index, and the texts, each of which ends in NUL.
    """
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return float(max(map(len, texts.split(b"\0"))))


def _read_entries(message: bytes, field: int) -> Iterator[bytes]:
    """Yield the texts and inner messages of a field.

    Source: protobuf.dev, "Encoding".

    Raises:
        ValueError: If it is damaged.
    """
    offset = 0
    last = len(message) - 1
    try:
        while offset <= last:
            # skip short entries of the vocabulary without calls: umT5 has 256,000 of them
            while offset < last and message[offset] == _PIECE and message[offset + 1] < 0x80:
                offset += 2 + message[offset + 1]
            if offset == last + 1:
                return
            key, offset = read_varint(message, offset)
            match key & 7:  # the wire type: varint, 64 bits, a length and as many bytes, or 32 bits
                case 0:
                    _, offset = read_varint(message, offset)
                case 1:
                    offset += 8
                case 2:
                    length, offset = read_varint(message, offset)
                    if key >> 3 == field:
                        yield message[offset : offset + length]
                    offset += length
                case 5:
                    offset += 4
                case kind:
                    raise ValueError(f"a field of the unknown kind {kind}")
    except IndexError:
        raise ValueError("it ends inside a field") from None
