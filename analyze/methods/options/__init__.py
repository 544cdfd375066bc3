"""What any score method can set: pooling over heads, keys kept in any case, adaptive budgets."""
