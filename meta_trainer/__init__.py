"""Meta-training and the paper's experiments (Woo, Yun and Kim, MCL-NF)."""
