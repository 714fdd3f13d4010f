"""Solvers: what stands for the inverse of the landmark kernel."""
