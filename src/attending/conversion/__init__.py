"""A checkpoint in, a better checkpoint out: one file per method."""
