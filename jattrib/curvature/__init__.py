"""Curvature: products with it, approximations of it, and systems solved in it."""
