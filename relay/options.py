"""What a worker was asked to be: the command line, understood and checked."""

from __future__ import annotations

from relay.process.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `relay-gevent`; times in seconds. docs/running.md describes each. `websocket` and
    `health` are each a port and the address of an interface, as `port` and `interface` are.

    `most_held` is how many connections there are descriptors for, those included that siblings hand on; `most_pipes`,
    for how many pipes beside `max_connections`. Both follow from the limit of file descriptors.
    """

    port: int = 4001
    interface: str = "::"
    websocket: tuple[int, str] | None = None
    health: tuple[int, str] | None = None
    ping_interval: float = 30.0
    congestion_control: str | None = None
    blur_usage: int | None = None
    log_fd: int | None = None
    log_path: str | None = None
    usage_db: str | None = None
    run_dir: str | None = None
    grace: float = 7.0
    handshake_timeout: float = 30.0
    wait_timeout: float = 3600.0
    max_connections: int = 1000
    most_held: int = 2000
    most_pipes: int = 100
    max_handshakes: int = 1000
    max_per_source: int = 500
    max_new_per_source: int = 200
    bounds_loopback: bool = False
    trusted_proxies: str | None = None
    proxy_protocol: bool = False
    upstream: str | None = None
    send_proxy: bool = False
    max_waiting: int = 1000
    max_waiting_per_token: int = 16
    idle_timeout: float = 86400.0
    max_pair_bytes: int | None = None
    pair_rate: int | None = None
    relay_rate: int | None = None
    measure_paths: bool = False
    check: bool = False
    own_interfaces: tuple[str, ...] = ()
    """Of --port, --websocket and --health those whose value names an interface; the others have that of --interface, or
    of --port."""

    def endpoints(self) -> list[tuple[str, int, str]]:
        """The option, the port and the interface of each place where it listens."""
        endpoints = [("--port" if self.upstream is None else "--websocket", self.port, self.interface)]
        for option, endpoint in (("--websocket", self.websocket), ("--health", self.health)):
            if endpoint is not None:
                endpoints.append((option, *endpoint))
        return endpoints

    def interface_named_by(self, option: str) -> str:
        """The option that has named the interface of `option`'s port: itself, or another one."""
        return next((other for other in (option, "--port") if other in self.own_interfaces), "--interface")
