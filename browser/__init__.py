"""A page for all runs: a server that reads their files and owns nothing.

options: options of run_browser.py: folders, address, token
runs: find runs by their histories, tell each at a glance
server: routes, and what a request must have to pass
start: serve pages or export one; show the address
views: pages, curves and files of one run
"""
