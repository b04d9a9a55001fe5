"""Media and captions on disk.

captions: caption files, and a table's additions to their text
clock: which frames of controls and masks go with a clip
companions: references of clips, masks of what is new
colors: images that are transparent or have a profile
decoding: turn a source into items to encode
downloads: download files at addresses, each of them once
fetching: make the bytes of a source a file
folders: list a folder, its control media, what is unused
frames: drop frames to a rate, cut spans; masks
guides: images that guide clips, found by name
layers: pictures with layers: whose they are, read together
left_out: files and folders that nothing reads
mask_files: which files are masks, and of what
media_source: an image or clip, its names and faults
missing: where a missing path was looked for, and a hint
moments: moments of clips, computed before, and of which VAE
numbering: numbers that are missing among numbered files
pairs: the worse one of each pair, by its name
reference_audio: sound that a clip's sound is made after
references: reference pictures: which, how large, what is wrong
remarks: about media and captions, in caching, training and --check
shown: references that a row shows with its clip
audio: the sound of clips: its file, seconds, faults
wildcards: choices in captions, drawn from the inside out
"""
