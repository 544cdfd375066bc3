"""What retrace finds and records: methods at equal bytes, replay beside the loop, models."""
