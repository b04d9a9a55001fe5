"""The keys of tables in CogVideoX form."""

from dataclasses import dataclass
from pathlib import Path

from dataset import config_keys as forms
from dataset.config_keys import LATENTS, NOTHING, key
from dataset.table import VIDEO


@dataclass(frozen=True)
class CogVideoXKeys:
    """The keys that only tables in CogVideoX form have."""

    cogvideox_root: Path = key(forms.PATH, kinds=VIDEO, stale=NOTHING)
    dataset_file: Path | None = key(forms.PATH, kinds=VIDEO, stale=NOTHING)
    video_column: str | None = key(forms.COLUMN, kinds=VIDEO, stale=NOTHING)  # None: the default names
    id_token: str = key(forms.WORDS, "", kinds=VIDEO, stale=NOTHING)  # put in front of each caption; "": none
    # latents are precomputed
    load_tensors: bool = key(forms.YES_NO, False, kinds=VIDEO, stale=LATENTS)

    @property
    def source(self) -> Path:
        """The table's source: its cogvideox_root folder."""
        return self.cogvideox_root

    @property
    def folder(self) -> Path:
        """Folder of the data, which also contains the caches unless the table names another folder."""
        return self.cogvideox_root

    def source_key(self, kind: str) -> str:
        """Return "cogvideox_root", the table key of the source for all kinds of tables."""
        return "cogvideox_root"
