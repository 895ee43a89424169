"""The tests tested: the package is broken in one place at a time, and the tests have to notice (``tox -e mutants``)."""
