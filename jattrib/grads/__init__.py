"""Per-example gradients of any output function."""
