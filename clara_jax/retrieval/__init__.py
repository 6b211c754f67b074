"""Retrieval: which memories of a store lie nearest to a question's."""
