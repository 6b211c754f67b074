"""Stage 3 of the quickstart in variants."""
