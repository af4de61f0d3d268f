"""Measurements that take long or need a machine; each says what it found."""
