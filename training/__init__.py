"""From options to saved files: training; read run.py first, then loop.py."""
