"""What a loss does not say of a model: whether it knows grammar, and how the stories are that it writes."""
