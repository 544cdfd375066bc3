"""Results as one page that a browser opens without a network, to look at and to mail."""
