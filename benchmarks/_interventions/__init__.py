"""The edits that `interventions.py` measures, each beside the same edit on an eager map."""
