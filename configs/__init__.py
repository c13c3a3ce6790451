"""The YAML files of sollune, and the loader of configurations."""
