"""Commands by the names of sd-scripts, for its users.

clean_captions_and_tags: cleans the texts of a metadata file
make_captions: captions a folder with a vision-language model
make_captions_by_git: captions a folder with a GIT model
merge_captions_to_metadata: collects caption files in a metadata file
merge_dd_tags_to_metadata: collects tag files in it
prepare_buckets_latents: caches the latents of its images
tag_images_by_wd14_tagger: writes tags as captions
"""
