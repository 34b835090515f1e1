"""What decoding costs, and what cheaper decoding costs in quality."""
