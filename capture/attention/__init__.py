"""Standing between a model and its attention function: calls, rules, rotations."""
