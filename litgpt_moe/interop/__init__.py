"""Checkpoints to and from other libraries, and from dense to Mixture-of-Experts."""
