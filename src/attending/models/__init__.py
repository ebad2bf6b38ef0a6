"""Whole models of the papers, small enough to train here."""
