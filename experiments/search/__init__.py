"""Exact search beside FAISS and NumPy, and its memory when a store does not fit."""
