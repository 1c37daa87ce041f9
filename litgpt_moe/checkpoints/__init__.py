"""Checkpoints: their place and names, reading, writing, and what a resume needs."""
