"""Checkpoint directories: names, reading, writing, and the state that a resume needs."""
