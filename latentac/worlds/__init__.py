"""What is drawn: sets of prompts, and the embedded world of shapes: generator, verifier and miniature models."""
