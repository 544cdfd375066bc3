"""The exact answers that every method is measured against."""
