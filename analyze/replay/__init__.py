"""The replay of methods over the units of a trace: planned, tried, timed, and kept part by part."""
