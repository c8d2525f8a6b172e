"""Tests of the two wheels as they are delivered: each alone in a bare environment."""
