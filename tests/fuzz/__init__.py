"""Fuzzing with atheris, which is guided by code coverage; by hand, and for some seconds in the tests."""
