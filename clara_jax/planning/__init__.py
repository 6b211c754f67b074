"""What a run will need, told before any accelerator is rented."""
