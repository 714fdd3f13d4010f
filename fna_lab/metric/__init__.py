"""Measurements: thin torchmetrics shells over `ops`, and cost."""
