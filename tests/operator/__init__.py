"""What an operator starts, installs, reads and asks."""
