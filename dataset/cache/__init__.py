"""Cache files: contents, and what they were made from.

catalog: the entries of shards, and writing a shard
commands: remember the options of the caching commands
converting: convert cache folders: single files to shards, and back
form: whether caches are in the form of their table
index: items of a folder, from caching to training
latent_files: what names of latent caches say
old_shards: read the tars of earlier versions
records: a cache file's origin in its metadata, and checks
shards: a store that keeps entries in shards, and merging
store: where entries are kept: read, write, list, remove
"""
