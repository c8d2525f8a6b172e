"""Tests of the whole project: unit, system, typing, and the lab that the system tests run in."""
