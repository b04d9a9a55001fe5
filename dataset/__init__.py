"""All about datasets: configuration, sources, caches and checks; read loop.py in caching/ first.

batches/: cached items in the order of training
cache/: cache files: names, contents, and what they were made from
caching/: the caching loop and its two halves
check: `--check`: report totals and faults of a configuration
checking/: faults of each table, page of items, repaired captions
cogvideox/: prepare clips in CogVideoX form, encoded
commands: run a caching script after its options are read
config: read a dataset configuration to frozen tables
config_keys: how values of keys are read; keys of subsets
debug_views: show the frames that a model will see
key_reading: read the keys of a configuration, explain wrong ones
options: options of all caching scripts
ray_options: options of caching on a Ray cluster
reporting/: the page about a dataset, also as JSON
scripts: make the caching scripts of a family
shard_names: names of the files of a cache in shards
sources/: media and captions on disk
subset_options: options that describe an image dataset without a file
subsets: the image guides' form of a dataset, as tables
table: one table: a `[[datasets]]` entry or a subset
"""
