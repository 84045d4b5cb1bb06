"""The world of words: images of one English word each, for rewards that read."""
