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
cutting/: find scenes in footage, and write clips of them
