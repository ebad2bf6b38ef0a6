"""The straightforward formulations that `operators.py` measures against, a file each."""
