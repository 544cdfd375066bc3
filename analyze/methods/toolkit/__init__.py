"""What methods are built from, open to authors of further ones."""
