"""The YAML files of sollune, and the one door that loads them."""
