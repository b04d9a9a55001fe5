"""Write the tags of a tagger as captions."""
