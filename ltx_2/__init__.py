"""LTX-2, 2.3 and 2.5, video with audio: read family.py first, then model.py.

audio_reference_options: options of voices, and which references are learned
audio_references: reference audio for generated clips, such as a voice
blocks: blocks of two streams, video and audio, and their attention
checkpoints: transformer files: what one is, and loading
configs: dimensions of a transformer, latents, names of parts, LoRA presets
connectors: from Gemma's states to texts of both streams
family: the releases, described for the shared loops
given: parts of clips that are given, in training
given_media: parts of a result that are kept of other media
given_media_options: options of the given parts of a generation
given_options: options of the given parts of clips in training
files: paths of a run, parts of a released file
gemma_4: the language model of LTX-2.5's texts
guidance: weights of guidance by stream, as released
keyframes: images that guide a video at one of its frames
learned_media: options of generation for what a LoRA is given
media: the family's half of latents, images and audio
model: the transformer around the blocks
model_options: options of files, how they run, and of guidance
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
reference_options: options of references (IC-LoRA)
references: clips and images that a clip is made from
refused_options: options of musubi-tuner's fork that are rejected, as data
released: parts of a released file, and their settings
rope: positions in seconds and pixels, and rotation by them
audio: mel spectrograms, audio VAE, vocoders, and their files
source_pasting: source pixels put back over what was kept
stage_options: options of making clips in two stages
stages: the two stages of a clip
text_encoder: Gemma with the connectors behind it
upscaler: latent upscalers, for the second stage
vae_checkpoints: files of the video VAE: dialects, list of layers
video_vae: the video VAE: pixels to latents and back
video_vae_blocks: its layers, with memory between chunks
"""
