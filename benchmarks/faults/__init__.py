"""What is lost when something fails, and what a long life leaks."""
