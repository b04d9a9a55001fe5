"""Released model files: which there are, their licenses, and how they are downloaded.

catalogue: reads the list of released files, catalogue.toml
fetching: downloads what a task needs, continued and compared
hubs: asks a site for address, size and checksum
listing: the list as text for a terminal
naming: reads the names that people give models
options: options of tools/download.py and what they choose
"""
