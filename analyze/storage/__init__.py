"""Files that are kept for later runs, and read without trust."""
