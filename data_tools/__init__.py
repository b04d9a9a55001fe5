"""Tools for datasets, used before caching: captions, clips cut from footage, reports.

bucket_latents: cache the latents of the images of a metadata file
captions/: write and edit captions with a vision-language model
cleaning: clean captions and tags in a metadata file
cogvideox/: prepare clips in CogVideoX form, encoded
controls/: control images of a folder: edges or depth
cutting/: find scenes in footage, and write clips of them
face_crops: cut faces out of images, upright
folder_captions: caption the images of a folder
folder_dataset: the dataset of a folder without a dataset file
folders: walk through folders, list the images of one
masks/: make masks, look through them, correct them
metadata: collect captions or tags in a metadata file
report/: faults and pages of a dataset, frames a model sees
smaller_images: smaller copies of a folder's images
tags/: write the tags of a tagger as captions
"""
