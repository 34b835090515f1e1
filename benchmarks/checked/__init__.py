"""What checked decoding gives: tokens, canvases and columns per drafter pass, beside how many answers stay what they were."""
