"""Landmark samplers: which tokens stand for all."""
