"""lm-eval tasks of our own, in its YAML format, and the functions that they name."""
