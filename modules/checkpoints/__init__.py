"""Files of weights: opened, recognised, streamed into networks, written."""
