"""Self-checks: what a trace holds must explain what the model computed."""
