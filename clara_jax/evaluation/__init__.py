"""A trained model measured against its controls: answers and retrieval over one data set."""
