"""Seconds per training step, beside PyTorch with PEFT."""
