"""Stages 1 and 2 of the quickstart in variants."""
