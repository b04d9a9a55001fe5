"""What all rooms share: files, media, layers, options, devices."""
