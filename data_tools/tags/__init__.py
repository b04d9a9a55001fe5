"""Write the tags of a tagger as captions.

labels: the tags that a tagger knows, with their categories
model: run a tagger's ONNX file on images and clips
options: options of tools/tag.py: model, thresholds, words
probabilities: probabilities of tags, for scores of samples
run: tag a folder after the options are read
words: choose tags by their probabilities and put them in order
"""
