"""Choosing a method and budget for every head, with bounds that hold on further text."""
