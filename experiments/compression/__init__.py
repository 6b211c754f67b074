"""Documents per second of the compressor, beside PyTorch with PEFT."""
