"""Trains models side by side at equal tokens, FLOPs or seconds, and says which is better, and by how much."""
