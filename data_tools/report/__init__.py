"""Look at a dataset: --check, its page, the page of dataset_report.py, and the frames that a model sees."""
