"""Cut footage into the clips of a dataset: find scenes, choose clips, write them and a list of them.

clips: decode a video once, choose its clips
options: options of cutting footage into clips
records: records of cut sources, and the list of clips
run: cut all videos of a command, several at once
scenes: find scenes frame by frame, in bounded memory
"""
