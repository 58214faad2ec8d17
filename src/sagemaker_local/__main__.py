"""`python -m sagemaker_local`, the same as `sagemaker-local`."""

from sagemaker_local.cli import main

if __name__ == "__main__":
    main()
