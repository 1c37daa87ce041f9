"""Text from a trained model: draw tokens, decode them, and write them as they come."""
