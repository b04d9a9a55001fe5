"""The page about a dataset, and the same numbers as JSON.

bins: summaries and histograms of numbers, as JSON values
captions: lengths, words and repeated texts of captions
cards: a card for each file: frames, numbers, caption
copies: find nearly equal pictures and clips by hashes
drawing: histograms, and what each bucket cuts off
measuring: read each source once and keep its numbers
numbers: all numbers of the report as one JSON object
options: options of tools/dataset_report.py: dataset, page, hashes
page: the page of the report: one HTML file
run: run tools/dataset_report.py after its options are read
tables: read tables for the report: sources and remarks
"""
