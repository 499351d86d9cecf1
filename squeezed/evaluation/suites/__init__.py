"""Suites: each splits its samples into a fixed context and the user input asked of it."""
