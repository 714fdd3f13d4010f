"""Attention variants over `(q, k, v)`: one file each, and one YAML of the same name."""
