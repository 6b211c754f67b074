"""Whether end-to-end training finds the second document that a two-hop question needs."""
