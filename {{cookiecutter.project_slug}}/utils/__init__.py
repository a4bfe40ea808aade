"""Small tools, each named for what it does."""
