"""The JSON files of a run as types: what stages hand on, and what the schemas in polar_deploy/schemas are made from."""
