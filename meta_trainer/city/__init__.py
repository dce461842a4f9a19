"""A generator of deterministic, textured, ray-traced training cities."""
