"""MiniMax-H3, video with audio: read family.py first, then model.py.

cache_marks: what caches of texts are for, and keys in them
cached_texts: how captions are cached: tasks, and what teachers read
conditions: latents of keyframes and references, their noise and positions
cached_references: references of the rows of a dataset, for caches
caching: what caches of latents hold, and how it is encoded
configs: dimensions of a transformer, noise, latents, the release
dit_checkpoints: transformer files: what one is, order of fused rows, loading
family: the model, described for the shared loops
files: paths of a run, VAEs, Qwen3-VL with its own tokenizer
model: the transformer: one sequence of images, audio and text
names: what it is called everywhere, from the license to tensors
options: own options for caching, training and generation
positions: times on a clock that text, images and audio share
presentation: what the text encoder sees in front of a prompt
reference_options: options of keyframes and references
reference_sound: audio of references: read, cut, resampled
references: keyframes and references of a request, and their pixels
released: statistics of latents, as numbers of the release
audio: the audio VAE and its files
training_inputs: conditions in training, and what a teacher sees
training_options: own options for training, names of other trainers
vae_checkpoints: files of the video VAE: dialects, dimensions
video_vae: the video VAE: pixels to latents and back
video_vae_blocks: its layers, encoder and decoder
vision: images and clips as the vision tower takes them
"""
