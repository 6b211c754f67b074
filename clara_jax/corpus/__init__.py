"""Corpora: documents from files and data sets, and the passages they are cut into."""
