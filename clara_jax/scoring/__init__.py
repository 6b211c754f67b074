"""How well a model answers (`answers`) and retrieves (`ranking`)."""
