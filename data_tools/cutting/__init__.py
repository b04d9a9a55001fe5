"""Cut footage into the clips of a dataset: find scenes, choose clips, write them and a list of them.

changes: what detectors find: where one scene ends and another begins
clip_list: the JSONL list of clips, a line each
footage: cut one video, and keep a record of it
inputs: which videos are cut, and names of their clips
looking: read all pictures of a video: scenes, times, measures
options: options of cutting footage into clips
planning: choose the clips of a video from its scenes
pyscenedetect: find cuts with PySceneDetect, an optional package
records: records of cut sources, so that reruns go on
run: cut all videos of a command, list their clips
scenes: find scenes picture by picture, in bounded memory
writing: write all clips of a video in one pass
"""
