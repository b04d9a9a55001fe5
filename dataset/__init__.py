"""All about datasets: configuration, sources, caches and checks; read loop.py in caching/ first.

batches/: cached items in the order of training
cache/: cache files: contents, and what they were made from
cache_files: names of cache files and their tensors; reading, writing
caching/: the caching loop and its two halves
config: read a dataset configuration to frozen tables
config_keys: how keys and their values are read, and explained
control_pairs: each image has its control image, and the reverse
forms/: forms of data: folders, lists, tables, tars; each deletable
idle_keys: keys of subsets that act only with others
listing: find the sources of a table, check their names
options: options of all caching scripts, of Ray too
other_trainers: translate data files of other trainers in messages
scripts: make the caching scripts of a family
sources/: media and captions on disk
subset_options: keys of subsets; options that stand for them
subsets: datasets in the layout of sd-scripts, as tables
table: one table: a `[[datasets]]` entry or a subset
timestep_keys: keys of a table's noise levels
"""
