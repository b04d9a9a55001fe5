"""Images and videos on disk, and their pixels.

augmenting: images that differ each time in training
buckets: sizes of an area, and bucket of an image
canvas: a reference image on a white canvas
colors: images and frames as a viewer shows them
companions: sound, subtitles and tags into another video
decoding: decode videos and animations image by image
edges: edges of an image as white lines
encoding: encode images to a video stream
labels: masks and conditions that OneTrainer lays next to images
layers: transparent layers of an image, written with their composite
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
streams: a video as images with exact times
tracks: made sound into a new video, or a WAV file
writing: write and join videos, take sound of a part
"""
