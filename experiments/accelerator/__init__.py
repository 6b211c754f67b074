"""Everything that is to be measured on one large GPU (or TPU), in ten minutes."""
