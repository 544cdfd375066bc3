"""Caches that hold keys and values in few bits: formats, and what a method sees of them."""
