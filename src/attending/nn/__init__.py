"""Attention layers and other modules to train with."""
