"""What time, memory and money a capture and a replay take."""
