"""SageMaker: training jobs that run the same commands as this machine, and the way home of what they find."""
