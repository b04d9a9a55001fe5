"""What a model family tells the shared loops: read family.py first."""
