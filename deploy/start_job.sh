#!/bin/sh
# What a training container starts, unpacked from the job's source beside src/: install what is missing, then train.
set -e
base=${SAGEMAKER_BASE_DIR:-/opt/ml}
python=${STOCKTAKE_PYTHON:-python}
lock=deploy/images/training/requirements.lock
needed='torch torchvision timm pytorch_lightning mlflow jsonargparse onnx openvino'
case ${MLFLOW_TRACKING_URI:-} in arn:*) needed="$needed sagemaker_mlflow" ;; esac
if ! "$python" -P -c "import importlib.util as u, sys; sys.exit(any(not u.find_spec(n) for n in '$needed'.split()))"; then
    echo "installing $lock"
    "$python" -P -m pip install --quiet --no-input --require-hashes -r "$base/code/$lock" || {
        mkdir -p "$base/output"
        echo "the image lacks one of $needed, and $lock could not be installed: build an image that has them" \
            > "$base/output/failure"
        exit 2
    }
fi
export PYTHONPATH="$base/code/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -P -m stocktake job
