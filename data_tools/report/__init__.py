"""Look at a dataset: --check, its page, the page of dataset_report.py, and the frames that a model sees.

check: plans of caching, caches of a training
files: each file for programs: crop, caption, caches
findings: faults and totals of each table; captions as UTF-8
layers: layers that do not fit their image
masks: how much of each mask is learned, lone masks
looks: read a source once: frames, crop, measures, references
numbers: all numbers of a dataset as one JSON object
options: options of tools/dataset_report.py: dataset, page, hashes
page: the page of a check and of the report
run: measure a dataset, then write page and JSON
audio: the sound of clips: facts, remarks, a drawing
views: show the frames that a model will see
"""
