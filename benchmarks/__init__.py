"""How fast retrace is, what it loses when things fail, and what it finds: README.md is the map."""
