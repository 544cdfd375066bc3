"""What was tallied as tidy tables, and the folder that holds them."""
