"""Commands that belong to no model.

cache_on_ray: caches a dataset on a Ray cluster
canny: draws the edges of one image
caption_dataset: writes captions with a vision-language model, or edits them
compare: makes a grid of clips, a column per LoRA
control_pictures: makes control images of a folder, edges or depth
convert_cache: turns the caches of a dataset into another form
dataset_report: writes a page about a dataset
detect_face_rotate: cuts faces out of images, turns them upright
doctor: tells what is installed, and what is missing
download: downloads the released files that a task needs
lora_post_hoc_ema: averages the saved LoRA files of a run
mask: makes masks of what you name in images
merge_models: merges whole checkpoints by their weighted sum
pack: makes one file of a described folder, for another machine
prepare_dataset: prepares clips and captions in CogVideoX form
quantise: stores a transformer or text encoder in 8 bits once
recipe: makes a recipe of a finished run, lists recipes
resize_images_to_resolution: writes smaller copies of images
run_browser: shows all runs of some folders while they train
score: scores the samples of a run, names the best file
share_page: copies a page without what is private
show_metadata: prints the metadata of a safetensors file
split_video: cuts footage into clips at its scenes
tag: writes the tags of a tagger as captions
unpack: makes the folder of such a file again
"""
