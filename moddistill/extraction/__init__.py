"""Extraction: the teacher over the records of a stage, once, into a cache."""
