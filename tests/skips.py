"""Skipped tests fail where MLA_MOE_SKIPS names the reasons for which they may.

A test whose library is missing skips itself for a user. CI installs all of
these libraries, so that a skip there would be a test that never runs.
"""

import os
import re

import pytest

EXPECTED = os.environ.get('MLA_MOE_SKIPS')


def check(report, expected):
  """Fails a report of a skip, unless its reason matches `expected`, a regex."""
  is_skip = report.skipped and not hasattr(report, 'wasxfail')
  reason = report.longrepr[2] if is_skip else ''
  if is_skip and not re.search(expected, reason):
    report.outcome = 'failed'
    report.longrepr = f'{reason}: CI runs all tests but "{expected}"'
  return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
  """Checks the report of each test."""
  report = yield
  return report if EXPECTED is None else check(report, EXPECTED)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
  """Checks the report of each file, which may be skipped whole."""
  report = yield
  return report if EXPECTED is None else check(report, EXPECTED)
