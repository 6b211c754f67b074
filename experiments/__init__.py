"""Measurements and studies, one command each."""
