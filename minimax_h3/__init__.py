"""MiniMax-H3, video with sound: read family.py first, then model.py.

configs: dimensions of a transformer, noise, latents, the release
dit_checkpoints: transformer files: what one is, order of fused rows, loading
family: the model, described for the shared loops
files: paths of a run, VAEs, Qwen3-VL with its own tokenizer
model: the transformer: one sequence of pictures, sound, conditions and text
names: what it is called everywhere, from the licence to tensors
options: own options for generation
places: positions on a clock that text, pictures and sound share
released: statistics of latents, as numbers of the release
sound: the VAE of sound, and its files
training_inputs: conditions of a training, and what a teacher sees
training_options: own options for training, and the known tuners' names of shared ones
vae_checkpoints: files of the video VAE: dialects, dimensions
video_vae: the video VAE: pixels to latents and back
video_vae_blocks: its layers, encoder and decoder
"""
