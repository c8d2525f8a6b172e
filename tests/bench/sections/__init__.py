"""What is measured, a module for each section: `KEY`, `TITLE` and `measure(field)`."""
