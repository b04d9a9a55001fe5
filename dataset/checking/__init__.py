"""What --check finds: faults and remarks of each table, the page that shows every item, captions repaired.

captions: missing, empty and too long captions
findings: result of a check: totals, faults, files left out
folders: files in a table's folder without a use
looks: frames and numbers of a source for the page
page: the page of --check: totals, faults, buckets, cards
repair: rewrite captions as UTF-8; old files stay as .bak
"""
