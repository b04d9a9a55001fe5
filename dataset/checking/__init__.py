"""What --check finds: faults and remarks of each table, the page that shows every item, captions repaired."""
