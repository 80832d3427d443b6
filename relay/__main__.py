"""`python -m relay` is `relay-gevent`; both begin here."""

from relay.process.signals import be_ready_for_signals


def main() -> None:
    """Run `relay-gevent` with the arguments of this process."""
    be_ready_for_signals()  # now: to import the rest takes a tenth of a second, in which one may come
    from relay.cli import main as run

    run()


if __name__ == "__main__":
    main()
