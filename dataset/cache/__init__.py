"""Cache files: names, contents, and what they were made from.

catalog: entries of a folder of shards, and their places
checks: whether sources have changed since their caches were made
converting: convert cache folders between single files and shards
files: cache files: names, tensor names, reading and writing
forms: form of a cache folder: single files or shards
index: verified facts of entries, kept in a Parquet file
memory: entries in host memory for one run
merging: merge small shards at the end of a run
npz: caches in npz files beside the pictures
npz_files: read npz files without trust, write them completely
npz_records: the record of our arrays in an npz file
npz_tensors: arrays of npz files as tensors, and back
packing: bytes of a cache file in memory, for shards
records: a cache file's origin in its metadata, and checks
shards: a store that keeps entries in large tars
store: where entries are kept: read, write, remove by name
tar_records: members of a plain tar, as records of a shard
"""
