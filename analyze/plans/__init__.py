"""A method and a budget for every kv head, which a run does head by head."""
