"""MiniMax-H3: videos with sound from one packed sequence of text, conditions, sound and pictures."""
