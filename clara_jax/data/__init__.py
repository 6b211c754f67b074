"""Records, prompts, tokenizer and fixed-shape batches."""
