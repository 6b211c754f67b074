"""Greedy decoding beside Hugging Face."""
