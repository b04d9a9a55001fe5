"""Media and captions on disk.

captions: caption files, and a table's additions to their text
clock: which frames of controls and masks go with a clip
companions: references of clips, masks of what is new
cogvideox: clips in CogVideoX form, moments computed before
colours: pictures that are transparent or have a profile
columns: read Parquet, CSV, TSV and JSONL row by row
decoding: turn a source into items to encode
downloads: download files at addresses, each of them once
fetching: make the bytes of a source a file
folders: list a folder, its control media, what is unused
frames: drop frames to a rate, cut spans; masks
left_out: files and folders that nothing reads
listing: find the sources of a table, check their names
media_source: an image or clip, its names and faults
pairs: the worse one of each pair, by its name
parquet: bounded reading of Parquet files, files in columns
references: reference pictures: which, how large, what is wrong
remarks: about media and captions, in caching, training and --check
rows: turn rows of lists and tables into sources
shown: references that a row shows with its clip
sound: the sound of clips: its file, seconds, faults
tables: sources of JSONL lists, tables and metadata JSON files
tar_index: samples of a tar, kept for the next run
tars: sources of tars, which are not unpacked
unread: columns of lists and tables that nothing reads
wildcards: choices in captions, drawn from the inside out
"""
