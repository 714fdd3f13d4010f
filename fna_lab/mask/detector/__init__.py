"""Detectors: hidden states or attention of one layer -> the set of tokens T."""
