"""`relay-usage`."""
