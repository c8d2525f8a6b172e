"""Tests of the whole project: unit tests, system tests, type checks, and the lab in which the system tests run."""
