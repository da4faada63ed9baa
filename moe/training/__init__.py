"""Training a language model: the loop, its data, and what a run leaves behind."""
