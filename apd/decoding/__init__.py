"""The paper: one decode step (`step`), what it starts from and leaves (`state`), and the loop around it (`loop`)."""
