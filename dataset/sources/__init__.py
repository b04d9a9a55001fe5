"""Media and captions on disk.

captions: caption files, and a table's additions to their text
cogvideox: clips of a dataset in CogVideoX form
columns: read Parquet, CSV, TSV and JSONL row by row
decoding: turn a source into items to encode
faults: faults of a dataset's files, collected for one report
fetching: make the bytes of a source a file; downloads
folders: list a folder, its control media, what is unused
frames: drop frames to a rate, cut spans; wrong rates
listing: find the sources of a table, and check them
masks: masks of the loss: white is learned, black not
media_source: an image or clip, its caption, place of its bytes
parquet: bounded reading of Parquet files, files in columns
prepared: moments of a VAE, and who made them
rows: turn rows of lists and tables into sources
stems: unique stems for sources without a file name
tables: sources of JSONL lists, tables and metadata JSON files
tar_index: samples of a tar, kept for the next run
tars: sources of image_tars or video_tars, in place
"""
