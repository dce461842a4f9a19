"""The wire protocol: typed messages, their bytes, and the client's end of a connection."""
