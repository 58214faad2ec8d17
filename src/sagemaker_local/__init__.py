"""A SageMaker on this machine, over moto: training jobs that run, endpoints that answer. README.md says how."""

import os

# moto reads it when it is imported. Without it, moto's server allows requests from the pages of every origin.
os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"
