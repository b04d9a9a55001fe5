"""Tools for finished videos: read, one stage or several, write, all as one stream.

blurring/: blur what a detector finds, and keep it blurred
chain_options: the tools by name, options of chains, places of models
contract: what flows through tools, stages, and networks' pixels
faces/: find faces and restore them: detectors, GFPGAN, CodeFormer
interpolation/: make pictures between pictures: GIMM-VFI with RAFT or FlowFormer
naming: input files of a run, and names of results
options: options of the run, of networks and of each tool
run: run tools on files, pictures and videos as one stream
scripts: the scripts of tools
stages: make the stages of tools, lead pictures through
streaming: read ahead and write behind in threads
tiling: pictures of any size in blended tiles, in half precision
upscaling/: enlarge pictures: SwinIR and the ESRGAN family
"""
