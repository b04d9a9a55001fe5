"""Commands by the names of sd-scripts, for its users.

make_captions: captions a folder with a vision-language model
merge_captions_to_metadata: collects caption files in a metadata file
merge_dd_tags_to_metadata: collects tag files in it
tag_images_by_wd14_tagger: writes tags as captions
"""
