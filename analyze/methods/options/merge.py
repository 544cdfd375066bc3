"""How what an eviction drops is folded into what it keeps."""

RULES = ("none", "d2o", "cam")
"""`d2o`: keys and values into those of the most similar key kept (D2O, arXiv:2406.13035;
AIoT-MLSys-Lab/D2O). `cam`: values into those of the next keys kept (CaM, ICML 2024;
zyxxmu/cam).
"""
MERGED = 16
"""Kept values that `cam` shares a dropped one out among, as in the authors' streaming code."""
SEED = 0
"""Of the random numbers by which `cam` merges."""
