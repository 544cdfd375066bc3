"""What is kept for later runs, which code it comes from, and how it is read: without trust."""
