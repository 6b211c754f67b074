"""The decoder, its adapters, its roles, and the differentiable top-k."""
