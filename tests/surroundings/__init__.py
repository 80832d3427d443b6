"""What is not the relay: the machine, its disk, its other programs."""
