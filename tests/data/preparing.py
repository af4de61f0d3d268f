"""Prepares the corpus of a folder, and says its fingerprint and tokens' sum.

python tests/data/preparing.py SOURCE CACHE
"""

import sys

import numpy as np
from texts import prepared, small


def outcome(text):
  return f'{text.fingerprint} {int(np.asarray(text.train, np.int64).sum())}'


if __name__ == '__main__':
  print(outcome(prepared(small(source=sys.argv[1]), sys.argv[2])))
