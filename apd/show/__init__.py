"""Traces as pictures, pages and terminal text."""
