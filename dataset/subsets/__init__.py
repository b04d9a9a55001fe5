"""The image guides' form of a dataset: its configuration, or folders alone, as tables.

fallbacks: the command line's values as keys of a file
folders: datasets without a file: folders, or a JSON list
reading: read `[[datasets.subsets]]` configurations to tables
"""
