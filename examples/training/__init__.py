"""The parts of `examples/train_pair.py`."""
