"""Fuzzing by atheris, which finds its way by what the code does; by hand, and for some seconds in the tests."""
