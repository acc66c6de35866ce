"""Answers to many people at once: the server behind the page, the terminal and the API."""
