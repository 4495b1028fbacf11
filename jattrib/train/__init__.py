"""Training as a pure function: one run as a scan over an index schedule, and many runs at once."""
