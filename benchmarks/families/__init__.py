"""Do the families compute what their published codes compute? `python -m benchmarks.families`"""
