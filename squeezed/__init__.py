"""Squeezed Attention: many questions over one long, fixed text, answered fast and right."""

__version__ = "0.1.0"
