"""Make masks for the images and clips in a folder, and change single masks."""
