"""How well a model answers (`answers`) and retrieves (`rankings`, `retrieval_sums`)."""
