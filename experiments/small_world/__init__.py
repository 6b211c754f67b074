"""A small synthetic world, and a tiny base model trained to answer questions about it from text."""
