"""Weights of other formats, in and out."""
