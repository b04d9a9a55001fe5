"""The web pages: set up, start and watch training runs, generate, and manage models, datasets and a queue."""
