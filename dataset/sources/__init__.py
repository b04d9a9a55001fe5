"""Media and captions on disk.

captions: caption files, and a table's additions to their text
clock: which frames of controls and masks go with a clip
companions: references of clips, masks of the generated part
colors: media with transparency, profiles or color codes
decoding: turn a source into items to encode
downloads: download remote files, each of them once
fetching: provide the files of a source on disk
folders: list a folder, its control media, what is unused
frames: drop frames to a rate, cut spans; masks
guides: images that guide clips, found by name
layers: images with layers: find and read the layers
left_out: files and folders that nothing reads
mask_files: which files are masks, and of what
media_source: an image or clip, its names and faults
missing: where a missing path was looked for, and a hint
moments: precomputed moments of clips, and their VAE
numbering: numbers that are missing among numbered files
pairs: the rejected item of each preference pair
reference_audio: sound that a clip's sound is modeled on
references: reference images: number, sizes, errors
remarks: warnings about media and captions
shown: reference media that a row names for its clip
audio: the audio of clips: its file, seconds, faults
wildcards: choices in captions, drawn from the inside out
"""
