"""One file a command, each with the one public function of its name."""
