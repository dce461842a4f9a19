"""The daemon: sockets, security, the loop and the compute thread."""
