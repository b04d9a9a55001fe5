"""Media and captions on disk.

animations: animated GIF and WebP files as clips
captions: caption files, and a table's additions to their text
cogvideox: clips of a dataset in CogVideoX form
columns: read Parquet, CSV, TSV and JSONL row by row
control: match control files with images or clips
decoding: turn a source into items to encode
downloading: download files at addresses, each once
faults: faults of a dataset's files, collected for one report
fetching: make the bytes of a source a file meanwhile
frames: drop frames to a rate, then cut spans
left_out: find unused things in a table's folder
listing: find media, captions and control files of a table
masks: masks of the loss: white is learned, black not
media_source: an image or clip with its caption, not opened
metadata_files: pictures that a metadata JSON names
moments: moments of a VAE, one .pt file per clip
origin: place of bytes in a tar, table or address
parquet_cells: images and clips in columns of Parquet files
parquet_pages: bound what a Parquet file unpacks to
prepared: the file prepare_dataset.py leaves: models and settings
rates: compare the frame rates of clips with their table
rows: turn rows of lists and tables into sources
stems: unique stems for sources without a file name
steps: sizes, lengths and latents that a model takes
tables: sources of an image_table_file or video_table_file
tar_index: samples of a tar, kept for the next run
tars: sources of image_tars or video_tars, in place
"""
