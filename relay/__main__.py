"""`python -m relay` is `relay-gevent`."""

from relay.cli import main

if __name__ == "__main__":
    main()
