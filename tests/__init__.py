"""The tests of relay-gevent: real sockets, real processes, loopback or network namespaces of their own."""
