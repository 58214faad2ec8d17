"""A local AWS: moto's server, and what moto lacks: jobs and endpoints whose containers really run on this machine."""
