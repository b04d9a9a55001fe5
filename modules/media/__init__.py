"""Images and videos on disk, and their pixels.

augmenting: pictures that differ each time in training
buckets: sizes of an area, and bucket of a picture
canvas: a reference picture on a white canvas
colors: images and frames as a viewer shows them
companions: sound, subtitles and tags into another video
decoding: decode videos and animations picture by picture
edges: edges of a picture as white lines
encoding: encode pictures to a video stream
labels: masks and conditions that OneTrainer lays next to pictures
layers: transparent layers of a picture, written with their composite
lengths: numbers of frames that clips of a model may have
measures: brightness, sharpness, stillness, hashes, and cuts of scenes
opening: open foreign images and videos safely; import PyAV
options: how videos are encoded, usual thresholds of edges
pixels: media as pixels for a VAE, and back
random_masks: masks for inpainting, drawn at random
reading: read images and videos as uint8 frames, and their texts
remedies: what to do with files nothing here reads
samples: the sound of a part of a file as samples
audio: encode sound and repack subtitles if a file needs it
streams: a video as pictures with exact times
tracks: made sound into a new video, or a WAV file
writing: write and join videos, take sound of a part
"""
