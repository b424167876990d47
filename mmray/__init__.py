"""Distributed image-text learning and archive scoring on Ray."""

__version__ = "0.1.0"
