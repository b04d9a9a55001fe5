"""Images and videos on disk, and their pixels.

animations: read animated GIF and WebP files
augmenting: pictures that differ each time in training
buckets: sizes of an area, and bucket of a picture
companions: sound, subtitles and tags into another video
decoding: decode a video file picture by picture
depth: pixels of 8 and of 16 bits a channel
encoding: encode pictures to a video stream
ffmpeg: import PyAV at its first use
measures: brightness, sharpness, stillness and hashes of media
opening: open foreign images and videos safely
options: options of how videos are encoded
pixels: media as pixels for a VAE, and back
reading: read images and videos as uint8 frames
scenes: tell whether a new scene begins between two neighbouring pictures
sections: the sound of a part of a video
sound: encode sound anew if a file needs it
streams: a video as pictures with exact times
subtitles: repack subtitles of text between kinds of files
tags: read the texts that images and videos carry
writing: write frames to files, and join videos
"""
