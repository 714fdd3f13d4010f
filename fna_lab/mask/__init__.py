"""Mask strategies: which tokens, which pairs, before or after softmax."""
