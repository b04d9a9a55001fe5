"""Cache files: names, contents, and what they were made from.

catalog: entries of shards and of old tars
converting: convert cache folders between single files and shards
files: cache files: names, tensor names, reading and writing
npz: caches in npz files beside the pictures
npz_files: read npz files without trust, write them completely
records: a cache file's origin in its metadata, and checks
shard_files: write and merge the SQLite files of shards
shards: a store that keeps entries in shards
store: where entries are kept: read, write, remove by name
"""
