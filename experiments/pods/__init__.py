"""Whether the paper-scale configurations fit pods of TPUs, and what holds them; compiled ahead of time."""
