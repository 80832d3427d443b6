"""`relay-status`."""
