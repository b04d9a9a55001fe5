"""What a model family tells the shared loops: start reading here."""
