"""Samples of what once failed in use, each with the whole kind that it stands for."""
