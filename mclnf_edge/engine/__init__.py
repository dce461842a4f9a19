"""The fast field's compiled kernels: pure functions on arrays, no state, no I/O.

`simd` vector operations, `field` the feature-plane module, `volume` ray marching forwards and
backwards, `learn` Fisher weights and parameter updates, `surface` height sweep and colour planes.
"""
