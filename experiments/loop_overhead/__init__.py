"""What the training loop costs beyond its steps."""
