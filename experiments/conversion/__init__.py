"""What a conversion costs."""
