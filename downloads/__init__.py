"""Released model files: which there are, their licences, and how they are downloaded.

catalogue: reads the list of released files, catalogue.toml
fetching: downloads a file, continued, with size and checksum
hubs: asks a site for address, size and checksum
kinds: whether a file that arrived is what it should
listing: the list as text, and tables for docs
options: options of tools/download.py and what they choose
run: downloads all that a task needs
"""
