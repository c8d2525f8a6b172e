"""Tests of the wheels as they are delivered: each in a clean environment."""
