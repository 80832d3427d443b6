"""What is recorded, and how."""
