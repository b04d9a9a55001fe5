"""Data forms: how items, rows and caches are stored.

The files of a form can be deleted with its line below or in `row_formats.py`, except for folder, jsonl and
metadata.
"""

from dataset.forms.cogvideox import COGVIDEOX
from dataset.forms.contract import SharedCaches, SourceFormat
from dataset.forms.folder import FOLDER
from dataset.forms.jsonl import JSONL
from dataset.forms.metadata import METADATA
from dataset.forms.npz import NPZ
from dataset.forms.tables import TABLES
from dataset.forms.tars import TARS

__all__ = ["CACHES", "FOLDER", "FORMS", "JSONL"]

# in the order in which messages name them, one a line
# fmt: off
FORMS: tuple[SourceFormat, ...] = (
    FOLDER,
    JSONL,
    TABLES,
    TARS,
    COGVIDEOX,
    METADATA,
)
CACHES: tuple[SharedCaches, ...] = (
    NPZ,
)
# fmt: on
