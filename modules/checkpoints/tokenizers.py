"""Find the tokenizer of a text encoder: given by the user, in or beside its folder, or on the hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from modules.checkpoints.opening import fingerprint
from modules.errors import CheckpointError


@dataclass(frozen=True)
class TokenizerFiles:
    """Hold which files are the tokenizer of one text encoder, and where they may be."""

    option: str  # "--t5_tokenizer"
    names: tuple[str, ...]  # any of these files is one; the first that exists is used
    folder: str  # its folder in the repository on the hub; "" for the top
    repository: str  # on the hub
    beside: tuple[str, ...]  # folders to search, relative to the encoder's; ".." only in front
    # must occur in a file that is beside a single-file encoder, where other tokenizers may be too
    token: str = ""

    def find(self, path: Path | None, checkpoint_path: Path) -> Path | None:
        """Return `path` if given, else the first file beside or inside the encoder's folder, else None.

        path: what the option names. Raises CheckpointError if `path` is given and is not a tokenizer.
        """
        if path is not None:
            return self._given(path)
        folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent
        for place in self.beside:
            parts = place.split("/")
            file = self._file_in(
                folder.parent.joinpath(*parts[1:]) if parts[0] == ".." else folder.joinpath(*parts)
            )
            is_loose = place == "." and not checkpoint_path.is_dir()
            if file is not None and not (is_loose and self.token.encode() not in file.read_bytes()):
                return file
        return None

    def identity(self, file: Path | None) -> str:
        """Return what distinguishes a tokenizer in cache records. file: None for the hub's."""
        return (
            fingerprint(file) if file is not None else "/".join(filter(None, (self.repository, self.folder)))
        )

    def download(self, checkpoint_path: Path) -> Path:
        """Return tokenizer.json of the hub, from its cache if it is there.

        Raises CheckpointError if the hub cannot be reached.
        """
        try:
            return Path(hf_hub_download(self.repository, "tokenizer.json", subfolder=self.folder or None))
        except Exception as error:  # no network, no such host, a proxy's answer: many classes, one remedy
            raise CheckpointError(
                f"no tokenizer for {checkpoint_path}: there is none beside it or inside it, and the hub "
                f"cannot be reached ({first_line(error)})\n  Give {self.option} {self._what()}.",
                checkpoint_path,
            ) from error

    def unreadable(self, file: Path, error: Exception) -> CheckpointError:
        """Return the error for a file that is not a tokenizer."""
        return CheckpointError(
            f"{file} cannot be read as a tokenizer ({first_line(error)}). Give {self.option} {self._what()}.",
            file,
        )

    def _given(self, path: Path) -> Path:
        if path.is_file():
            return path
        if not path.is_dir():
            raise CheckpointError(f"{self.option} {path}: there is no such file or folder.", path)
        for place in (path, *(path / place for place in self.beside if not place.startswith(".."))):
            file = self._file_in(place)
            if file is not None:
                return file
        found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{self.option} {path}: the folder has none of {', '.join(self.names)} (it holds {found}). Give "
            f"{self._what()}.",
            path,
        )

    def _file_in(self, folder: Path) -> Path | None:
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def _what(self) -> str:
        place = (
            f"the folder {self.folder} of {self.repository}"
            if self.folder
            else f"the files of {self.repository}"
        )
        return f"{place} (or its {' or '.join(self.names[:2])})"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
