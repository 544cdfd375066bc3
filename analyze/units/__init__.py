"""The unit of work: one kv head and the queries that share it, as attention sees them."""
