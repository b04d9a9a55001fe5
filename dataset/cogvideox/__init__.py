"""Prepare clips in CogVideoX form: choose frames and sizes, encode, write the folders that trainers read.

artifacts: write the files of one item, each completely
captions: encode captions, one text encoder after the other
clips: read clips ahead, encode in batches, write behind
items: items of a prepared folder, and which are finished
model_folder: find a diffusers pipeline and the kind of VAE
options: options of prepare_dataset.py: media, sizes, models
pipeline: CogVideoX's own VAE and text encoder
preparing: captions, then clips, then their lists; reruns continue
shapes: choose the frames and the size of a clip
"""
