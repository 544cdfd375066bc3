"""From the plan to the finished store: sequences are run and their tensors written."""
