"""Benchmarks: every figure that the README quotes, measured as ratios."""
