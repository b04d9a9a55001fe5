"""Folders of media as pages see them: files, captions, datasets, and the three files of a training."""
