"""Objectives and regularisers to train with: one file per method."""
