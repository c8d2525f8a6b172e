"""Code that is only type-checked: the public API as users and driver authors meet it."""
