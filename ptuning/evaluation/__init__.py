"""Answers to the rows of a split, and their scores."""
