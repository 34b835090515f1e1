"""Traces as terminal text, HTML players and plots."""
