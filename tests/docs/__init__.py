"""Tests of the documentation, and what writes its generated pages."""
