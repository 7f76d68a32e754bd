"""Ideas that were tried, measured and not taken: each with the ADR that says why, and a command that repeats it."""
