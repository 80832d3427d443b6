"""Chromium against a relay: what a web client meets."""
