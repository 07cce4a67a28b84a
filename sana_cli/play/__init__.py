"""A page that draws while one types."""
