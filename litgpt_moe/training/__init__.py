"""Pretraining: settings, checks, and LitGPT's own loop with ours around it."""
