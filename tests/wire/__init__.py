"""Tests of the wire protocol, and the small daemon and proxy that they use."""
