"""Pure mathematics: arrays and tensors in, arrays and tensors out; no files, no sockets."""
