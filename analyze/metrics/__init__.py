"""How far a selection is from exact attention, in moments over queries."""
