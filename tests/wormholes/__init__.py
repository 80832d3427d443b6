"""The real clients."""
