"""Sums the results in a directory of JUnit files from pytest: `12 passed, 0 failed, 1 skipped`."""

import sys
from pathlib import Path
from xml.etree import ElementTree

passed = failed = skipped = 0
for report in sorted(Path(sys.argv[1]).glob("*.xml")):
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        left_out = int(suite.get("skipped", 0))
        failed += bad
        skipped += left_out
        passed += int(suite.get("tests", 0)) - bad - left_out
print(f"{passed} passed, {failed} failed, {skipped} skipped")
