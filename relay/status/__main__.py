"""`python -m relay.status` is `relay-status`; both begin here."""

from relay.process.signals import be_ready_for_signals


def main() -> None:
    """Run `relay-status` with the arguments of this process."""
    be_ready_for_signals()  # now: to import the rest takes a tenth of a second, in which one may come
    from relay.status.cli import main as run

    run()


if __name__ == "__main__":
    main()
