"""What methods in the loop cost, as tables and a picture."""
