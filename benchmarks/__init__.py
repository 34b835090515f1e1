"""Benchmarks of `apd`, imported from the repository root and not installed."""
