"""Other people's programs that drive an `APDSampler`."""
