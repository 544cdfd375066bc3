"""What the model reads: sequences of tokens from tasks, documents and earlier traces."""
