"""Data forms: how items, rows and caches are stored.

The files of a form can be deleted with its line below or in `row_formats.py`, except for folder, jsonl and
metadata.

cogvideox: prompts and clips in two lists or a table
cogvideox_keys: the keys of such tables
cogvideox_lists: read these lists, and find precomputed tensors
columns: the rows and columns of a table of any format
composing: combine all forms: their keys and shared caches
contract: base classes of forms of items, rows and caches
delimited: tables as text, CSV and TSV
delimited_rows: read CSV and TSV row by row
folder: images or clips in a folder
jsonl: lists with a JSON object on each line
jsonl_rows: read JSONL row by row, and list its sources
metadata: a JSON file of sd-scripts with captions
metadata_listing: find the images that the file names
npz: caches shared with sd-scripts
npz_files: read npz files without trust, write them completely
npz_store: caches in npz files next to the images
parquet: tables in Parquet, a file or a folder of parts
parquet_files: bounded reading of Parquet files, files in columns
parquet_parts: the files of a Parquet table
parquet_rows: read Parquet row by row
row_formats: the formats of rows, and reading a file in any
rows: turn rows of lists and tables into sources
tables: tables of any format with a column of paths
tables_listing: find the sources of a table
tars: WebDataset tars, which are not unpacked
tars_index: samples of a tar, stored for the next run
tars_listing: find the sources of tars
unread: columns of lists and tables that nothing reads
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
