"""The shipped recipes: YAML files that the package carries as data."""
